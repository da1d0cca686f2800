import importlib
import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from conformance.random_weights import random_weights
from tests.helpers.checkpoint_files import library, write_safetensors
from tests.helpers.models import CONFIG
from xglm_core import convert_checkpoint, open_checkpoint
from xglm_core.checkpoint import plan_loading
from xglm_core.checkpoint.dtypes import BFLOAT16, BY_CODE, DTYPES, FLOAT16, FLOAT32, FLOAT64, convert
from xglm_core.checkpoint.safetensors import SafetensorsFile
from xglm_core.errors import CheckpointError, InputError
from xglm_core.files import replacing

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "matrix": RANDOM.standard_normal((7, 5)),
    "vector": RANDOM.standard_normal(3),
    "scalar": np.array(1.5),
    "empty": np.zeros((0, 4)),
    "größe": RANDOM.standard_normal((2, 3, 2)),
}


def write(path, arrays, dtype=FLOAT32):
    arrays = {name: np.asarray(array, dtype.storage) for name, array in arrays.items()}
    with replacing(path) as file:
        write_safetensors(file, [(name, dtype, array.shape) for name, array in arrays.items()], arrays.__getitem__)
    return arrays


def write_raw(path, header, data=b""):
    """A file with any header: an object to be written as JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def read_all(path):
    """Everything that a reader can do with a file."""
    file = SafetensorsFile(path)
    arrays = {name: file.read(name).copy() for name in file.tensors}
    for name in file.tensors:
        file.release(name)
    return arrays


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


class TestAgainstTheReferenceLibrary:
    @pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=lambda dtype: dtype.name)
    def test_it_reads_ours(self, path, dtype):
        arrays = write(path, ARRAYS, dtype)
        theirs = safetensors.numpy.load_file(path)
        assert theirs.keys() == arrays.keys()
        for name, array in arrays.items():
            assert theirs[name].dtype == array.dtype
            np.testing.assert_array_equal(theirs[name], array)
            assert theirs[name].shape == array.shape

    @pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, FLOAT64], ids=lambda dtype: dtype.name)
    def test_we_read_its(self, path, dtype):
        arrays = {name: np.asarray(array, dtype.storage) for name, array in ARRAYS.items()}
        safetensors.numpy.save_file(arrays, path, metadata={"format": "np", "note": "any"})
        file = SafetensorsFile(path)
        assert file.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            assert file.tensors[name].dtype is dtype
            assert file.tensors[name].shape == array.shape
            np.testing.assert_array_equal(file.read(name), array)
            assert file.read(name).dtype == array.dtype

    def test_it_reads_our_bfloat16(self, path):
        bits = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2111
        write(path, {"w": bits}, BFLOAT16)
        ((name, theirs),) = safetensors.deserialize(path.read_bytes())
        assert (name, theirs["dtype"], theirs["shape"]) == ("w", "BF16", [4, 6])
        assert bytes(theirs["data"]) == bits.tobytes()

    def test_we_read_its_bfloat16(self, path):
        torch = library("torch")
        tensor = torch.randn(4, 6).to(torch.bfloat16)
        importlib.import_module("safetensors.torch").save_file({"w": tensor}, path)
        file = SafetensorsFile(path)
        assert file.tensors["w"].dtype is BFLOAT16
        np.testing.assert_array_equal(file.read("w"), tensor.view(torch.uint16).numpy())

    def test_format_is_named(self, path):
        """transformers refuses a file that does not say which framework's layout it has."""
        write(path, ARRAYS)
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}

    def test_tensors_are_aligned(self, path):
        write(path, {"a" * length: np.zeros(2) for length in range(1, 9)})
        file = SafetensorsFile(path)
        assert all(info.begin % 8 == 0 for info in file.tensors.values())

    def test_wrong_array_is_not_written(self, path):
        for array in (np.zeros(4, np.float32), np.zeros(3, np.float64), np.zeros((3, 1), np.float32)):
            with pytest.raises(ValueError, match=r"w: announced float32 \(3,\), got"), replacing(path) as file:
                write_safetensors(file, [("w", FLOAT32, (3,))], {"w": array}.__getitem__)
        assert list(path.parent.iterdir()) == []

    def test_transposed_array_is_written_by_value(self, path):
        array = np.arange(6, dtype=np.float32).reshape(2, 3).T
        write(path, {"w": array})
        np.testing.assert_array_equal(read_all(path)["w"], array)


class TestMapping:
    def test_writing_into_a_view_leaves_the_file(self, path):
        write(path, ARRAYS)
        before = path.read_bytes()
        view = SafetensorsFile(path).read("matrix")
        view[:] = 7
        assert (view == 7).all()
        assert path.read_bytes() == before
        assert (SafetensorsFile(path).read("matrix") != 7).all()

    def test_views_share_memory(self, path):
        write(path, ARRAYS)
        file = SafetensorsFile(path)
        assert np.shares_memory(file.read("matrix"), file.read("matrix"))

    def test_views_outlive_the_reader(self, path):
        arrays = write(path, ARRAYS)
        np.testing.assert_array_equal(SafetensorsFile(path).read("matrix"), arrays["matrix"])

    def test_views_outlive_a_replaced_file(self, path):
        arrays = write(path, ARRAYS)
        file = SafetensorsFile(path)
        view = file.read("matrix")
        write(path, {name: -array for name, array in ARRAYS.items()})
        np.testing.assert_array_equal(view, arrays["matrix"])
        np.testing.assert_array_equal(file.read("vector"), arrays["vector"])
        np.testing.assert_array_equal(SafetensorsFile(path).read("matrix"), -arrays["matrix"])

    def test_release_reads_the_file_again(self, path):
        large = np.arange(30_000, dtype=np.float32)
        arrays = write(path, {"before": np.ones(10), "large": large, "after": np.ones(10)})
        file = SafetensorsFile(path)
        views = {name: file.read(name) for name in arrays}
        for view in views.values():
            view += 1
        file.release("large")
        # Whole pages are the file's again; the pages shared with the neighbours, and these, keep what was written.
        restored = views["large"] == large
        assert restored[5000:25_000].all()
        assert (views["large"][~restored] == large[~restored] + 1).all()
        assert (views["before"] == 2).all()
        assert (views["after"] == 2).all()

    def test_release_of_small_tensors(self, path):
        arrays = write(path, ARRAYS)
        file = SafetensorsFile(path)
        for name, array in arrays.items():
            file.release(name)
            np.testing.assert_array_equal(file.read(name), array)

    def test_unaligned_tensor(self, path):
        data = struct.pack("<e", 1) + struct.pack("<f", 2.5)
        write_raw(path, {"half": entry(0, 2, dtype="F16"), "single": entry(2, 6)}, data)
        file = SafetensorsFile(path)
        assert file.read("half").tolist() == [1]
        assert file.read("single").tolist() == [2.5]


VALUES = struct.pack("<2f", 1, 2)
DEPTHS = [10, 100, 490, 900, 990, 3000, 100_000]
HOSTILE = {
    "no object": (b"[]", b"", "the header is a list"),
    "a number": (b"3", b"", "the header is a int"),
    "no JSON": (b"{'a': 1}", b"", "not JSON"),
    "no header": (b"", b"", "not JSON"),
    "a half object": (b'{"a": ', b"", "not JSON"),
    "two objects": (b"{}{}", b"", "not JSON"),
    "zero bytes": (b"{}\0\0", b"", "not JSON"),
    "Latin-1": ('{"ü": 1}'.encode("latin-1"), b"", "not JSON"),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16-le"), VALUES[:4], "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "not JSON"),
    "surrogate": (b'{"\xed\xa0\x80": {}}', b"", "not JSON"),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", b"", "not JSON"),
    "entry is null": ({"a": None}, VALUES[:4], "tensor 'a': expected dtype, shape and data_offsets"),
    "entry is a list": ({"a": ["F32", [1], [0, 4]]}, VALUES[:4], "expected dtype, shape and data_offsets"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, VALUES[:4], "expected dtype, shape and data_offsets"),
    "another key": ({"a": {**entry(), "more": 1}}, VALUES[:4], "expected dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry(dtype="C64", end=8)}, VALUES, "dtype is 'C64', expected one of F32, F16, BF16, F64"),
    "dtype in lower case": ({"a": entry(dtype="f32")}, VALUES[:4], "dtype is 'f32'"),
    "dtype is a number": ({"a": entry(dtype=32)}, VALUES[:4], "dtype is 32"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, VALUES[:4], "dtype is"),
    "dtype is long": ({"a": entry(dtype="F" * 10**6)}, VALUES[:4], "dtype is 'FFF"),
    "shape is a number": ({"a": {**entry(), "shape": 1}}, VALUES[:4], "shape is 1, expected a list of sizes"),
    "negative size": ({"a": entry(shape=[-1])}, VALUES[:4], r"shape is \[-1\]"),
    "two negative sizes": ({"a": entry(shape=[-1, -1])}, VALUES[:4], r"shape is \[-1, -1\]"),
    "float size": ({"a": entry(shape=[1.0])}, VALUES[:4], r"shape is \[1.0\]"),
    "infinite size": (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', VALUES[:4], "inf"),
    "bool size": ({"a": entry(shape=[True])}, VALUES[:4], r"shape is \[True\]"),
    "text size": ({"a": entry(shape=["1"])}, VALUES[:4], r"shape is \['1'\]"),
    "huge size": ({"a": entry(shape=[2**64 + 1])}, VALUES[:4], "shape is"),
    "huge product": ({"a": entry(shape=[2**32, 2**32])}, VALUES[:4], "shape is"),
    "product of too many digits": ({"a": entry(shape=[10**4000, 10**4000])}, VALUES[:4], "shape is"),
    "huge but empty": ({"a": entry(shape=[0, 2**62, 2**62], end=0)}, b"", "shape is"),
    "too many dimensions": ({"a": entry(shape=[1] * 100)}, VALUES[:4], "shape is"),
    "offset alone": ({"a": {**entry(), "data_offsets": 0}}, VALUES[:4], r"data_offsets is 0, expected \[begin, end\]"),
    "one offset": ({"a": {**entry(), "data_offsets": [4]}}, VALUES[:4], r"data_offsets is \[4\]"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 4]}}, VALUES[:4], "data_offsets is"),
    "negative offset": ({"a": entry(begin=-4, end=0)}, VALUES[:4], "data_offsets is"),
    "float offset": ({"a": entry(begin=0.0, end=4.0)}, VALUES[:4], "data_offsets is"),
    "bool offset": ({"a": entry(begin=False)}, VALUES[:4], "data_offsets is"),
    "offset of too many digits": (
        {"a": {"dtype": "F32", "shape": [0], "data_offsets": [int("9" * 4300)] * 2}},
        b"",
        "data_offsets is",
    ),
    "offsets swapped": ({"a": entry(begin=4, end=0)}, VALUES[:4], r"shape \[1\] needs 4 bytes, data_offsets hold -4"),
    "shape larger than bytes": ({"a": entry(shape=[3], end=8)}, VALUES, r"shape \[3\] needs 12 bytes, .* hold 8"),
    "shape smaller than bytes": ({"a": entry(shape=[1], end=8)}, VALUES, r"shape \[1\] needs 4 bytes, .* hold 8"),
    "dtype smaller than bytes": ({"a": entry(dtype="F16")}, VALUES[:4], "needs 2 bytes"),
    "past the end": ({"a": entry(shape=[2], end=8)}, VALUES[:7], "the file is truncated"),
    "far past the end": ({"a": entry(begin=2**40, end=2**40 + 4)}, VALUES, "the file is truncated"),
    "overlap": ({"a": entry(), "b": entry()}, VALUES[:4], "overlaps another tensor"),
    "half an overlap": ({"a": entry(), "b": entry(2, 6)}, VALUES[:6], "tensor 'b': begins .* overlaps another tensor"),
    "empty within another": (
        {"a": entry(0, 8, [2]), "b": entry(4, 4, [0])},
        VALUES,
        "tensor 'b': begins .* overlaps another tensor",
    ),
    "hole": ({"a": entry(4, 8)}, VALUES, "leaves unnamed bytes before it"),
    "hole in the middle": (
        {"a": entry(), "b": entry(8, 12)},
        VALUES + VALUES[:4],
        "tensor 'b': .* leaves unnamed bytes",
    ),
    "trailing bytes": ({"a": entry()}, VALUES, "the tensors end at byte .*, but the file has"),
    "bytes without tensors": ({}, VALUES, "the tensors end at byte"),
    "name twice": (b'{"a": {}, "a": {}}', b"", "the header names 'a' twice"),
    "key twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "the header names 'dtype' twice"),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', b"", "the header names '__metadata__' twice"),
    "metadata is a list": ({"__metadata__": ["pt"], "a": entry()}, VALUES[:4], "__metadata__ is"),
    "metadata is null": ({"__metadata__": None, "a": entry()}, VALUES[:4], "__metadata__ is None"),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": entry()}, VALUES[:4], "__metadata__ is"),
    "name of two lines": ({"a\nb": entry()}, VALUES[:4], r"the tensor name 'a\\nb' is not printable text"),
    "name with a terminal code": ({"a\x1b[2J": entry()}, VALUES[:4], "is not printable text"),
    "name with a surrogate": ({"\ud800": entry()}, VALUES[:4], "is not printable text"),
}


class TestHostileFiles:
    def rejected(self, path, match):
        with pytest.raises(CheckpointError, match=match) as error:
            read_all(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
        assert len(message) < len(str(path)) + 320

    @pytest.mark.parametrize(("header", "data", "match"), HOSTILE.values(), ids=HOSTILE.keys())
    def test_header(self, path, header, data, match):
        self.rejected(write_raw(path, header, data), match)

    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")], ids=["list", "object"])
    @pytest.mark.parametrize(
        "place", ['{"a": %s}', '{"__metadata__": %s}', '{"a": {"dtype": %s, "shape": [], "data_offsets": [0, 4]}}']
    )
    def test_depth(self, path, depth, opening, closing, place):
        nested = opening * depth + "1" + closing * depth
        self.rejected(write_raw(path, (place % nested).encode(), VALUES[:4]), None)

    @pytest.mark.parametrize("length", [1, 10**6, 10**8 + 1, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1])
    def test_length_of_the_header(self, path, length):
        write_raw(path, {"a": entry()}, VALUES[:4])
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        self.rejected(path, "not JSON" if length == 1 else f"the header claims {length} bytes, but [0-9]+ follow")

    def test_one_of_many_names_twice(self, path):
        """In time that grows with their number alone."""
        names = ",".join(f'"{number}":0' for number in [*range(400_000), 399_999])
        self.rejected(write_raw(path, b"{%s}" % names.encode()), "the header names '399999' twice")

    def test_many_tensors(self, path):
        write_raw(path, {str(number): entry(0, 0, [0]) for number in range(60_000)})
        self.rejected(path, "the file has more than 50000 tensors")

    def test_every_truncation(self, path):
        write(path, ARRAYS)
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            self.rejected(path, "truncated|not JSON")

    def test_appended_byte(self, path):
        write(path, ARRAYS)
        path.write_bytes(path.read_bytes() + b"\0")
        self.rejected(path, "the tensors end at byte")

    def test_random_mutations(self, path):
        """A changed file is read completely or rejected by name; no other exception, no reading outside of it."""
        write(path, {"a": ARRAYS["matrix"], "b": ARRAYS["vector"]})
        whole = path.read_bytes()
        header_bytes = 8 + struct.unpack("<Q", whole[:8])[0]
        random = np.random.default_rng(1)
        read, messages = 0, []
        for _ in range(600):
            mutant = bytearray(whole)
            for position in random.integers(0, len(whole), random.integers(1, 4)):
                # Mostly characters that JSON gives a meaning to.
                mutant[position] = random.choice(list(b'0123456789{}[]",:-.eE\\ nt\x00\xff'))
            path.write_bytes(mutant)
            try:
                arrays = read_all(path)
            except CheckpointError as error:
                messages.append(str(error))
            else:
                assert sum(array.nbytes for array in arrays.values()) == len(whole) - header_bytes
                read += 1
        assert all(message.startswith(f"{path}: ") and message.isprintable() for message in messages)
        assert read > 20
        assert len(messages) > 20

    def test_empty_file(self, path):
        path.write_bytes(b"")
        self.rejected(path, "expected at least 8 bytes, found 0; the file is truncated")

    def test_missing_file(self, path):
        self.rejected(path, "cannot be read: No such file or directory")

    def test_folder(self, path):
        path.mkdir()
        self.rejected(path, "cannot be read: Is a directory")


class TestAllowed:
    def test_no_tensors(self, path):
        assert read_all(write_raw(path, {})) == {}
        assert read_all(write_raw(path, {"__metadata__": {}})) == {}

    def test_padded_header(self, path):
        assert read_all(write_raw(path, b'{"a": %s}   ' % json.dumps(entry()).encode(), VALUES[:4])) == {"a": [1]}

    def test_any_order_of_entries(self, path):
        write_raw(path, {"b": entry(4, 8), "empty": entry(4, 4, [0]), "a": entry(0, 4)}, VALUES)
        assert {name: array.tolist() for name, array in read_all(path).items()} == {"a": [1], "b": [2], "empty": []}

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
    def test_every_type(self, path, dtype):
        arrays = write(path, {"w": np.arange(5)}, dtype)
        assert read_all(path)["w"].tolist() == arrays["w"].tolist() == [0, 1, 2, 3, 4]


class TestEightBits:
    """Types that are read alone."""

    BITS = np.arange(256, dtype=np.uint8)

    def values(self, name):
        """What PyTorch takes each pattern for."""
        torch = library("torch")
        return torch.from_numpy(self.BITS).view(getattr(torch, name)).float().numpy()

    @pytest.mark.parametrize(("code", "name"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
    def test_every_number(self, path, code, name):
        write_raw(path, {"w": entry(0, 256, [16, 16], code)}, self.BITS.tobytes())
        file = SafetensorsFile(path)
        dtype = file.tensors["w"].dtype
        assert dtype is BY_CODE[code]
        with np.errstate(invalid="ignore"):
            found = convert(file.read("w"), dtype, FLOAT32)
        np.testing.assert_array_equal(found.reshape(-1), self.values(name), strict=True)
        signs = np.signbit(found.reshape(-1))[~np.isnan(found.reshape(-1))]
        np.testing.assert_array_equal(signs, (self.BITS >= 128)[~np.isnan(found.reshape(-1))])
        half = convert(file.read("w"), dtype, FLOAT16).reshape(-1)
        np.testing.assert_array_equal(half.astype(np.float32), self.values(name))  # All of them are float16, too.
        bits = convert(file.read("w"), dtype, BFLOAT16).reshape(-1).astype(np.uint32) << 16
        np.testing.assert_array_equal(bits.view(np.float32), self.values(name))

    def test_models_have_float32(self, tmp_path):
        weights = {name: np.abs(array).astype(np.float16) for name, array in random_weights(CONFIG, seed=1).items()}
        stored = {name: (array.view(np.uint16) >> 8).astype(np.uint8) for name, array in weights.items()}
        CONFIG.save_pretrained(tmp_path)
        with open(tmp_path / "model.safetensors", "wb") as file:
            tensors = [(name, BY_CODE["F8_E5M2"], array.shape) for name, array in stored.items()]
            write_safetensors(file, tensors, stored.__getitem__)
        plan = plan_loading(open_checkpoint(tmp_path), with_head=True, dtype="auto")
        assert plan.dtype is FLOAT32
        with pytest.raises(InputError, match="are of 8 bits, which can only be read; give the dtype"):
            convert_checkpoint(tmp_path, tmp_path / "new", to="torch")
        convert_checkpoint(tmp_path, tmp_path / "new", to="torch", dtype="float16")
        checkpoint = open_checkpoint(tmp_path / "new")
        for name, array in stored.items():
            np.testing.assert_array_equal(checkpoint.read(name).view(np.uint16), array.astype(np.uint16) << 8)
