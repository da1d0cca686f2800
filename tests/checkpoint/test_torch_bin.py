"""Files of `torch.save`, as PyTorch writes them and as an attacker might."""

import builtins
import collections
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.helpers.checkpoint_files import library
from xglm_core.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from xglm_core.checkpoint.tensor_pickle import TensorPickle
from xglm_core.checkpoint.torch_bin import TorchFile
from xglm_core.errors import CheckpointError

FLOATS = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "float64": FLOAT64}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


@pytest.fixture
def torch():
    return library("torch")


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def save(request, torch, path):
    """Writes a value in either container and opens it."""

    def save(value, **options):
        torch.save(value, path, _use_new_zipfile_serialization=not request.param, **options)
        return TorchFile(path)

    return save


def rejected(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        TorchFile(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 320


class TestAgainstPyTorch:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_types_of_torch_save(self, torch, save, dtype):
        tensor = torch.randn(7, 5).to(getattr(torch, dtype))
        file = save({"w": tensor, "scalar": tensor[0, 0].clone(), "empty": tensor[:0].clone()})
        assert {name: info.shape for name, info in file.tensors.items()} == {"w": (7, 5), "scalar": (), "empty": (0, 5)}
        assert file.tensors["w"].dtype is FLOATS[dtype]
        bits = torch.uint16 if dtype == "bfloat16" else tensor.dtype
        np.testing.assert_array_equal(file.read("w"), tensor.view(bits).numpy())
        assert file.read("scalar") == tensor[0, 0].view(bits).numpy()
        assert file.read("empty").shape == (0, 5)

    def test_views(self, torch, save):
        base = torch.arange(60.0).reshape(3, 4, 5)
        views = {
            "transposed": base[0].T,
            "permuted": base.permute(2, 0, 1),
            "part": base[1:, 1:3],
            "step": base[:, :, ::2],
            "row": base[2, 3],
            "diagonal": base[0].diagonal(),
        }
        # One by one, as together they would be more than their storage.
        for name, view in views.items():
            file = save({name: view})
            np.testing.assert_array_equal(file.read(name), view.numpy())
            file.release(name)
            np.testing.assert_array_equal(file.read(name), view.numpy())

    def test_shared_storage(self, torch, save):
        flat = torch.arange(24.0)
        file = save({"a": flat[:6].view(2, 3), "b": flat[6:].view(3, 6), "lm_head.weight": flat.view(4, 6)})
        assert file.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.read("b")[0].tolist() == [6, 7, 8, 9, 10, 11]
        assert np.shares_memory(file.read("lm_head.weight"), file.read("b"))

    def test_modules(self, torch, save):
        """Ordered dictionaries with versions, parameters, a parameter with attributes, hooks."""
        module = torch.nn.Linear(3, 2)
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.note = "with a state"
        file = save({**module.state_dict(keep_vars=True), "p": parameter})
        np.testing.assert_array_equal(file.read("weight"), module.weight.detach().numpy())
        assert file.read("p").tolist() == [1, 1]
        assert save(module.state_dict()).tensors.keys() == {"weight", "bias"}

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_protocols(self, torch, save, protocol):
        names = [f"layer.{index}.weight" for index in range(400)]  # More than one byte counts.
        file = save(
            {name: torch.full((2,), float(index)) for index, name in enumerate(names)}, pickle_protocol=protocol
        )
        assert [float(file.read(name)[1]) for name in names] == list(range(400))

    def test_empty(self, save):
        assert save({}).tensors == {}
        assert save(collections.OrderedDict()).tensors == {}

    def test_views_do_not_change_the_file(self, torch, save, path):
        file = save({"w": torch.zeros(5000)})
        before = path.read_bytes()
        file.read("w")[:] = 7
        assert path.read_bytes() == before

    def test_big_endian(self, torch, path):
        torch.save({"w": torch.arange(5.0), "h": torch.arange(5).half()}, path)
        members = {i.filename: zipfile.ZipFile(path).read(i) for i in zipfile.ZipFile(path).infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                if name.endswith("byteorder"):
                    data = b"big"
                if "/data/" in name:
                    data = np.frombuffer(data, "<f4" if len(data) == 20 else "<f2").byteswap().tobytes()
                archive.writestr(name, data)
        file = TorchFile(path)
        assert file.read("w").tolist() == file.read("h").tolist() == [0, 1, 2, 3, 4]
        assert file.read("w").dtype == np.dtype("<f4")

    def test_large_offsets(self, torch, path):
        """Archives beyond 4 GiB have their offsets in other fields. The file has a hole: it takes no disk."""
        torch.save({"w": torch.arange(3.0)}, path)
        whole = path.read_bytes()
        end = whole.rindex(b"PK\5\6")
        directory = struct.unpack_from("<L", whole, end + 16)[0]
        shift = 5 * 2**30
        entries, position = b"", directory
        while position < end and whole[position : position + 4] == b"PK\1\2":
            head = bytearray(whole[position : position + 46])
            name, extra, comment = struct.unpack_from("<3H", head, 28)
            offset = struct.unpack_from("<L", head, 42)[0]
            struct.pack_into("<H", head, 30, 12)
            struct.pack_into("<L", head, 42, 2**32 - 1)
            text = whole[position + 46 : position + 46 + name]
            entries += bytes(head) + text + struct.pack("<2HQ", 1, 8, offset + shift)
            position += 46 + name + extra + comment
        count = struct.unpack_from("<H", whole, end + 10)[0]
        start = shift + directory
        tail = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), start)
        tail += struct.pack("<4sLQL", b"PK\6\7", 0, start + len(entries), 1)
        tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
        with open(path, "wb") as file:
            file.write(b"PK\3\4")
            file.seek(shift)
            file.write(whole[:directory] + entries + tail)
        assert TorchFile(path).read("w").tolist() == [0, 1, 2]


class TestRefusedContents:
    @pytest.mark.parametrize(
        ("value", "match"),
        [
            ([1, 2], "holds a list, expected a dictionary of tensors by name"),
            ({1: 2}, "holds a dict, expected a dictionary of tensors by name"),
            ({"a": 1.5}, "'a': is a float, expected a tensor"),
            ({"a": {"b": None}}, "'a': is a dict, expected a tensor"),
        ],
    )
    def test_no_tensors(self, save, path, value, match):
        with pytest.raises(CheckpointError, match=match):
            save(value)

    def test_integers(self, torch, save):
        file = save({"w": torch.ones(2), "i": torch.arange(3)})
        assert (file.tensors.keys(), file.others.keys()) == ({"w"}, {"i"})

    def test_repeated_elements(self, torch, save):
        """A few bytes that would be terabytes."""
        with pytest.raises(CheckpointError, match=r"tensor 'w': offset 0, shape .* reach beyond the 1 numbers"):
            save({"w": torch.ones(1).expand(2**20, 2**20)})

    def test_many_names_of_one_storage(self, torch, save):
        flat = torch.ones(1000)
        with pytest.raises(CheckpointError, match=r"the tensors have 40000 bytes, but the file has .*: they overlap"):
            save({f"w{index}": flat for index in range(10)})

    def test_sparse(self, torch, save):
        with pytest.raises(CheckpointError, match=r"refused: the pickle names 'torch\._utils\._rebuild_sparse_tensor'"):
            save({"w": torch.ones(2, 2).to_sparse()})

    def test_whole_module(self, torch, save):
        with pytest.raises(CheckpointError, match=r"refused: the pickle names 'torch\.nn\.modules\.linear\.Linear'"):
            save(torch.nn.Linear(2, 2))


class TestDamagedArchives:
    @pytest.fixture
    def members(self, torch, path):
        torch.save({"w": torch.arange(50.0)}, path)
        return {i.filename: zipfile.ZipFile(path).read(i) for i in zipfile.ZipFile(path).infolist()}

    def rewrite(self, path, members, **options):
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    def test_rewritten(self, path, members):
        self.rewrite(path, members)
        assert TorchFile(path).read("w").tolist() == list(range(50))

    def test_compressed(self, path, members):
        self.rewrite(path, members, compression=zipfile.ZIP_DEFLATED)
        rejected(path, "member '.*data.pkl': is compressed or encrypted; PyTorch stores tensors as they are")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_name_twice(self, path, members):
        with zipfile.ZipFile(path, "w") as archive:
            for name in [*members, *members]:
                archive.writestr(name, members[name])
        rejected(path, "the archive has two members")

    def test_two_pickles(self, path, members):
        self.rewrite(path, {**members, "other/data.pkl": b"."})
        rejected(path, r"the archive has 2 members '\*/data\.pkl', expected one")

    def test_no_storage(self, path, members):
        self.rewrite(path, {name: data for name, data in members.items() if "/data/" not in name})
        rejected(path, "storage '0': 50 numbers of FloatStorage are 200 bytes, but the file has none")

    @pytest.mark.parametrize("size", [0, 199, 201])
    def test_size_of_a_storage(self, path, members, size):
        self.rewrite(path, {name: bytes(size) if "/data/" in name else data for name, data in members.items()})
        rejected(path, f"storage '0': 50 numbers of FloatStorage are 200 bytes, found {size}")

    def test_overlapping_members(self, path, members):
        inner = io.BytesIO()
        self.rewrite(inner, {"b": b"data"})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", inner.getvalue())
            archive.writestr("b", b"data")
        whole = bytearray(path.read_bytes())
        struct.pack_into("<L", whole, whole.rindex(b"PK\1\2") + 42, 31)  # To the header within the bytes of the first.
        path.write_bytes(whole)
        rejected(path, "member 'b': begins at byte 31, expected [0-9]+: it overlaps another one")

    def test_every_truncation(self, path, members):
        whole = path.read_bytes()
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            rejected(path, "truncated")

    def test_trailing_bytes(self, path, members):
        path.write_bytes(path.read_bytes() + b"\0")
        rejected(path, "the file is truncated or has trailing bytes")

    def test_byteorder(self, path, members):
        self.rewrite(path, {name: b"middle" if "byteorder" in name else data for name, data in members.items()})
        rejected(path, "byteorder is b'middle', expected 'little' or 'big'")


class TestDamagedLegacyFiles:
    @pytest.fixture
    def whole(self, torch, path):
        torch.save({"w": torch.arange(5.0), "v": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
        return path.read_bytes()

    def test_every_truncation(self, path, whole):
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            rejected(path, "truncated|neither a zip archive|has 0 numbers")

    def test_trailing_bytes(self, path, whole):
        path.write_bytes(whole + b"\0")
        rejected(path, "the tensors end at byte .*, but the file has")

    @pytest.mark.parametrize("count", [0, 4, 6, 2**31, 2**61, 2**62, 2**64 - 1])
    def test_count(self, torch, path, count):
        torch.save({"w": torch.arange(5.0)}, path, _use_new_zipfile_serialization=False)
        whole = bytearray(path.read_bytes())
        whole[-28:-20] = struct.pack("<Q", count)
        path.write_bytes(whole)
        rejected(path, f"storage '[0-9]+': has {count} numbers, expected 5")


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")


def legacy(path, data):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + data)


HOSTILE = {
    "os.system": (lambda mark: Calls(os.system, f"touch {mark}"), "posix.system"),
    "eval": (lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
    "exec": (lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
    "open": (lambda mark: Calls(open, str(mark), "w"), "io.open"),
    "getattr": (lambda mark: Calls(getattr, dict, "clear"), "builtins.getattr"),
    "import": (lambda mark: Calls(builtins.__import__, "os"), "builtins.__import__"),
    "loads": (lambda mark: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {mark}"))), "_pickle.loads"),
    "exit": (lambda mark: Calls(os._exit, 7), "posix._exit"),
    "namespace": (lambda mark: __import__("argparse").Namespace(a=1), "argparse.Namespace"),
}
# Pickles by hand: (bytes, what the message says).
CRAFTED = {
    "torch.load": (b"\x80\x02ctorch.serialization\n_load\n)R.", "names 'torch.serialization._load'"),
    "nested name": (
        b"\x80\x04\x8c\x05torch\x8c\x1c_utils.os.system.__globals__\x93.",
        "refused: the pickle names 'torch",
    ),
    "name from numbers": (b"\x80\x04K\x01K\x02\x93.", "refused: the pickle names ''"),
    "INST": (b"(S'touch'\nios\nsystem\n.", "instruction (INST|STRING), which no checkpoint"),
    "OBJ": (b"(ctorch\nFloatStorage\no.", "instruction OBJ"),
    "EXT1": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "call of a storage class": (b"ctorch\nFloatStorage\n)R.", "gives torch.FloatStorage other arguments"),
    "call of a text": (b"\x8c\x01a)R.", "refused: the pickle calls a str"),
    "call of nothing": (b")R.", "takes values from an empty stack"),
    "attributes of a function": (
        b"ctorch._utils\n_rebuild_tensor_v2\n}\x8c\x08__code__Nsb.",
        "treats a _Name as a dict",
    ),
    "dictionary with contents": (
        b"ccollections\nOrderedDict\n]\x85R.",
        "gives collections.OrderedDict other arguments",
    ),
    "memo bomb": (b"Nr\xff\xff\xff\x7f.", "holds a NoneType"),
    "empty memo": (b"j\xff\xff\xff\xff.", "uses its value 4294967295 before it has one"),
    "huge text": (b"\x80\x04\x8d" + b"\xff" * 8 + b"a.", "damaged or cut short"),
    "huge frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "holds a NoneType"),
    "huge integer": (b"\x8b\x00\x01\x00\x00" + b"\x7f" * 256 + b".", "an integer of 2047 bits"),
    "long digits": (b"L" + b"9" * 5000 + b"L\n.", "damaged or cut short|an integer of"),
    "no stop": (b"N" * 100, "damaged or cut short"),
    "no mark": (b"Nt.", "a mark that it never set"),
    "below a mark": (b"N(\x85.", "takes values from an empty stack"),
    "list as a key": (b"}]Ns.", "has a list as a key"),
    "name twice": (b"}(\x8c\x01aN\x8c\x01aNu.", "names 'a' twice"),
    "odd number of items": (b"}(Nu.", "a key without a value"),
    "append to a text": (b"\x8c\x01aNa.", "treats a str as a list"),
    "storage of another kind": (
        b"(\x8c\x07storage\x8c\x01a\x8c\x01b\x8c\x01cK\x01tQ.",
        "describes a storage in another",
    ),
    "storage view": (
        b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x01)tQ.",
        "describes a storage in another way",
    ),
    "two sizes of a storage": (
        b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x01tQ"
        b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x02tQ.",
        "describes the storage '0' in two ways",
    ),
    "terminal codes": (b"c\x1b[2J\nx\n.", r"names '\\x1b\[2J\.x'"),
}


class TestHostilePickles:
    """Nothing runs, whatever a pickle names; none of these need PyTorch."""

    @pytest.mark.parametrize("container", [zipped, legacy])
    @pytest.mark.parametrize(("value", "name"), HOSTILE.values(), ids=HOSTILE.keys())
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_calls(self, path, tmp_path, container, value, name, protocol):
        mark = tmp_path / "ran"
        container(path, pickle.dumps({"w": value(mark)}, protocol))
        # Protocol 2 has the names of Python 2.
        name = name.replace("builtins", "(builtins|__builtin__)").replace("_pickle", "_?pickle")
        rejected(path, f"refused: the pickle names '{name}', which no tensor needs; nothing of it was run")
        assert not mark.exists()

    @pytest.mark.parametrize("container", [zipped, legacy])
    @pytest.mark.parametrize(("data", "match"), CRAFTED.values(), ids=CRAFTED.keys())
    def test_crafted(self, path, container, data, match):
        container(path, data)
        # In a legacy file, the pickle with the storages is missing, which shows first where the value may be.
        rejected(path, match if container is zipped or "holds" not in match else "damaged or cut short")

    @pytest.mark.parametrize(
        "data",
        [
            b"N" + b"\x85" * 400_000 + b".",
            b"]" * 1 + b"](" * 200_000 + b"e" * 200_000 + b".",
            b"(" * 400_000 + b"t" * 400_000 + b".",
            b"}" * 8_000_000 + b".",
            b"N" * 8_000_000 + b".",
            b"(" * 8_000_000 + b".",
            b"\x8c\xff" + b"a" * 255 + b"q\x00" + b"h\x00" * 4_000_000 + b".",
            # Each list holds the one before ten times.
            b"]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(200)) + b".",
        ],
        ids=["tuples", "lists", "marks", "dictionaries", "values", "open marks", "memo", "exponential"],
    )
    def test_bombs(self, path, data):
        """Neither the stack nor memory nor time grow with what the pickle makes of its bytes."""
        zipped(path, data)
        tracemalloc.start()
        begin = time.perf_counter()
        rejected(path, "instructions|holds a|damaged or cut short|mark that it never set|empty stack")
        seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200e6
        assert seconds < 60  # Under `tracemalloc`; a bomb would take hours.

    def test_only_names_of_state_dicts(self):
        """An attacker has these words to write with, and no others."""
        accepted = []
        for name in [*(f"builtins\n{name}" for name in dir(builtins)), "torch\nFloatStorage", "torch._utils\n__dict__"]:
            try:
                TensorPickle(f"c{name}\n.".encode(), CheckpointError)
                accepted.append(name)
            except CheckpointError:
                pass
        assert accepted == ["torch\nFloatStorage"]
