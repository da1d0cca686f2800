"""Files of `flax.serialization`, as Flax writes them and as an attacker might."""

import importlib
import struct

import numpy as np
import pytest

from tests.helpers.checkpoint_files import library
from xglm_core.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from xglm_core.checkpoint.flax_msgpack import FlaxFile
from xglm_core.errors import CheckpointError

FLOATS = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "float64": FLOAT64}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flax_model.msgpack"


@pytest.fixture
def serialization():
    library("flax")
    return importlib.import_module("flax.serialization")


def rejected(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        FlaxFile(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 320


class TestAgainstFlax:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_types_in_msgpack(self, path, serialization, dtype):
        array = (
            np.random.default_rng(0).standard_normal((7, 5)).astype(importlib.import_module("jax.numpy").dtype(dtype))
        )
        path.write_bytes(serialization.to_bytes({"a": {"bias": array, "scale": array[0], "empty": array[:0]}}))
        file = FlaxFile(path)
        assert {name: info.shape for name, info in file.tensors.items()} == {
            "a.bias": (7, 5),
            "a.weight": (5,),
            "a.empty": (0, 5),
        }
        assert file.tensors["a.bias"].dtype is FLOATS[dtype]
        np.testing.assert_array_equal(file.read("a.bias").view(array.dtype), array)
        np.testing.assert_array_equal(file.read("a.weight").view(array.dtype), array[0])

    def test_kernels_are_transposed_without_a_copy(self, path, serialization):
        kernel = np.arange(35, dtype=np.float32).reshape(5, 7)
        path.write_bytes(serialization.to_bytes({"fc1": {"kernel": kernel}}))
        file = FlaxFile(path)
        assert file.tensors["fc1.weight"].shape == (7, 5)
        np.testing.assert_array_equal(file.read("fc1.weight"), kernel.T)
        assert np.shares_memory(file.read("fc1.weight"), file.read("fc1.weight"))

    @pytest.mark.parametrize("name", ["embedding", "kernel"])
    @pytest.mark.parametrize("size", [16, 32, 60, 136])
    def test_pieces(self, path, serialization, monkeypatch, name, size):
        """Above a size, which is 1 GiB, Flax cuts arrays; not at the end of a row."""
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", size)
        array = np.arange(35, dtype=np.float32).reshape(5, 7)
        path.write_bytes(serialization.to_bytes({"a": {name: array, "bias": array[0, :2]}}))
        assert b"__msgpack_chunked_array__" in path.read_bytes()
        file = FlaxFile(path)
        expected = array.T if name == "kernel" else array
        np.testing.assert_array_equal(file.read("a.weight"), expected)
        file.release("a.weight")
        np.testing.assert_array_equal(file.read("a.weight"), expected)
        assert file.tensors["a.weight"].shape == expected.shape
        assert file.read("a.bias").tolist() == [0, 1]

    def test_many(self, path, serialization):
        """Maps and lengths of every width."""
        tree = {f"layer{index}": {"bias": np.full(index, index, np.float32)} for index in range(300)}
        tree["long"] = {"bias": np.zeros(2**15, np.float32)}
        path.write_bytes(serialization.to_bytes(tree))
        file = FlaxFile(path)
        assert len(file.tensors) == 301
        assert file.read("layer299.bias").tolist() == [299] * 299


def text(value):
    return bytes([0xD9, len(value)]) + value.encode()


def array(shape=(2,), dtype="float32", data=bytes(8), parts=3):
    dimensions = bytes([0x90 | len(shape)]) if len(shape) < 16 else b"\xdc" + struct.pack(">H", len(shape))
    payload = bytes([0x90 | parts]) + dimensions + b"".join(b"\xcf" + struct.pack(">Q", n) for n in shape)
    payload += text(dtype) + b"\xc6" + struct.pack(">L", len(data)) + data
    return b"\xc9" + struct.pack(">L", len(payload)) + b"\x01" + payload


def mapping(**items):
    return bytes([0x80 | len(items)]) + b"".join(text(name) + value for name, value in items.items())


def pieces(shape, chunks):
    marked = {"__msgpack_chunked_array__": b"\xc3", "shape": mapping(**shape), "chunks": mapping(**chunks)}
    return mapping(a=mapping(**marked))


HOSTILE = {
    "nothing": (b"", "expected at least 1 bytes, found 0"),
    "a number": (b"\x07", "expected a map of parameters"),
    "a list": (b"\x90", "is of the msgpack type array, expected a map or an array"),
    "unknown code": (b"\xc1", "msgpack code 0xc1"),
    "nil": (mapping(a=b"\xc0"), "parameter 'a': has a value of the msgpack code 0xc0"),
    "leaf is a number": (mapping(a=b"\x07"), "parameter 'a': is a int, expected an array"),
    "leaf is a text": (mapping(a=text("b")), "parameter 'a': is of the msgpack type str"),
    "trailing bytes": (mapping(a=array()) + b"\0", "the parameters end at byte .*, but the file has"),
    "two names": (b"\x82" + 2 * (text("a") + array()), "has two entries 'a'"),
    "two names after translation": (
        mapping(**{"a.b": mapping(bias=array()), "a": mapping(b=mapping(bias=array()))}),
        "two",
    ),
    "scale and kernel": (mapping(a=mapping(scale=array(), kernel=array())), r"two tensors 'a\.weight'"),
    "name is a number": (b"\x81\x01" + array(), "has a value of the msgpack type int, expected str"),
    "name is long": (b"\x81\xda\x01\x00" + b"a" * 256 + array(), "a text of 256 bytes, expected at most 255"),
    "name is no text": (b"\x81\xa1\xff" + array(), "a text that is not UTF-8"),
    "name of two lines": (mapping(**{"a\nb": array()}), r"the tensor name 'a\\nb' is not printable text"),
    "unknown type": (
        mapping(a=array(dtype="complex64", data=bytes(16))),
        "parameter 'a': has another type, expected one of",
    ),
    "object type": (mapping(a=array(dtype="object", data=bytes(16))), "has another type"),
    "other extension": (mapping(a=b"\xd4\x03\x00"), "is of the extension type 3, expected an array"),
    "four parts": (mapping(a=array(parts=4)), "expected shape, type and numbers"),
    "shape larger": (mapping(a=array(shape=(3,))), r"shape \[3\] of float32 needs 12 bytes, found 8"),
    "shape smaller": (mapping(a=array(shape=(1,))), r"needs 4 bytes, found 8"),
    "huge size": (mapping(a=array(shape=(2**63,))), "expected shape, type and numbers"),
    "product that overflows": (mapping(a=array(shape=(2**40, 2**40))), "expected shape, type and numbers"),
    "huge but empty": (mapping(a=array(shape=(0, 2**40, 2**40), data=b"")), "expected shape, type and numbers"),
    "many dimensions": (mapping(a=array(shape=(1,) * 40, data=bytes(4))), "expected shape, type and numbers"),
    "huge map": (b"\xdf\xff\xff\xff\xff", "expected at most 100000 entries"),
    "many maps": (b"\xde\xff\xff" + b"\xa1a\xde\xff\xff" * 5, "expected at most 100000 entries"),
    "long path": (
        b"\x81" + text("n" * 250) + b"\x81" + text("n" * 250) + mapping(b=array()),
        "more than 500 characters",
    ),
    "deep": (b"\x81\xa1a" * 100_000, "and 16 levels"),
    "deep lists": (b"\x91" * 100_000, "is of the msgpack type array"),
    "piece is missing": (pieces({"0": b"\x04"}, {"0": array()}), r"shape \[4\] needs 4 numbers of one type, .* have 2"),
    "piece is left over": (pieces({"0": b"\x02"}, {"0": array(), "1": array()}), "needs 2 numbers of one type"),
    "no pieces": (pieces({"0": b"\x00"}, {}), "needs 0 numbers of one type"),
    "pieces of two types": (
        pieces({"0": b"\x06"}, {"0": array(), "1": array((4,), "float16")}),
        "needs 6 numbers of one type",
    ),
    "pieces out of order": (pieces({"0": b"\x04"}, {"1": array(), "0": array()}), "not numbered from 0 on"),
    "matrix as a piece": (pieces({"0": b"\x02"}, {"0": array((2, 1))}), "expected sizes and flat chunks"),
    "number as a piece": (pieces({"0": b"\x02"}, {"0": b"\x02"}), "expected sizes and flat chunks"),
    "array as a size": (pieces({"0": array()}, {"0": array()}), "expected sizes and flat chunks"),
    "mark alone": (mapping(a=mapping(__msgpack_chunked_array__=b"\xc3")), "expected a shape and chunks"),
}


class TestHostileFiles:
    """By hand: none of these need Flax."""

    def test_good(self, path):
        path.write_bytes(mapping(a=mapping(bias=array(data=struct.pack("<2f", 1, 2)))))
        assert FlaxFile(path).read("a.bias").tolist() == [1, 2]
        path.write_bytes(pieces({"0": b"\x04"}, {"0": array(), "1": array(data=struct.pack("<2f", 1, 2))}))
        assert FlaxFile(path).read("a").tolist() == [0, 0, 1, 2]

    @pytest.mark.parametrize(("data", "match"), HOSTILE.values(), ids=HOSTILE.keys())
    def test_damage(self, path, data, match):
        path.write_bytes(data)
        rejected(path, match)

    def test_every_truncation(self, path):
        whole = mapping(a=mapping(bias=array(), kernel=array((2, 1)))) + b""
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            rejected(path, "truncated")
