"""The files that cost a reader most for their size: it may take that size and 200 MB."""

import json
import struct
import zipfile
from pathlib import Path

import pytest

from tests.checkpoint.test_flax_msgpack import array, mapping, text
from tests.helpers.commands import run

if not Path("/proc/self/status").exists():
    pytest.skip("measures memory as Linux counts it", allow_module_level=True)

LIMIT = 200_000_000


def header(data):
    return struct.pack("<Q", len(data)) + data


def archive(path, data):
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("a/data.pkl", data)


def empty_leaves(count):
    leaf = array(shape=(0,), data=b"")
    leaves = b"".join(text(f"{number:06}") + leaf for number in range(count))
    return b"\x81" + text("n" * 240) + b"\x81" + text("m" * 240) + b"\xdf" + struct.pack(">L", count) + leaves


def zip_directory(count):
    entries = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0) + b"%05d" % number
        for number in range(count)
    )
    return b"PK\3\4" + entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(entries), 4, 0)


FILES = {
    "JSON lists": ("model.safetensors", lambda: header(b'{"a":[' + b"[]," * 1_990_000 + b"[]]}")),
    "JSON names": ("model.safetensors", lambda: header(json.dumps({str(n): {} for n in range(400_000)}).encode())),
    "JSON characters": ("model.safetensors", lambda: header(('{"%s":1}' % ("a" * 5_000_000 + "\U0001f600")).encode())),
    "pickled dictionaries": ("pytorch_model.bin", lambda: b"}" * 8_000_000 + b"."),
    "pickled tuples": ("pytorch_model.bin", lambda: b"(K\x07t" * 2_000_000 + b"."),
    "pickled characters": ("pytorch_model.bin", lambda: b"X\x00\x00\x78\x00" + b"a" * 7_864_316 + b"\xf0\x9f\x98\x80."),
    "pickled numbers": ("pytorch_model.bin", lambda: b"G\x40\x09\x21\xfb\x54\x44\x2d\x18" * 900_000 + b"."),
    "directory": ("pytorch_model.bin", lambda: zip_directory(80_000)),
    "parameters": ("flax_model.msgpack", lambda: empty_leaves(49_000)),
    "too many parameters": ("flax_model.msgpack", lambda: empty_leaves(99_000)),
    "maps": (
        "flax_model.msgpack",
        lambda: b"\xdf\x00\x01\x80\x00" + b"".join(text(f"{number:06}") + b"\x80" for number in range(98_304)),
    ),
    "one parameter": ("flax_model.msgpack", lambda: mapping(a=array())),
}


@pytest.mark.parametrize(("name", "data"), FILES.values(), ids=FILES.keys())
def test_memory_of_a_hostile_file(tmp_path, name, data):
    path, data = tmp_path / name, data()
    if name.endswith(".bin") and not data.startswith(b"PK"):
        archive(path, data)
    else:
        path.write_bytes(data)
    code = f"""
import json, pathlib
from xglm_core.checkpoint.formats import FORMATS
from xglm_core.errors import CheckpointError
path = pathlib.Path({str(path)!r})
(reader,) = [format.open for format in FORMATS.values() if format.file == path.name]
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak()
try:
    file = reader(path)
except CheckpointError:
    pass
print(json.dumps(peak() - before))
"""
    grown = run(code)
    print(f"{grown / 1e6:.0f} MB for a file of {path.stat().st_size / 1e6:.1f} MB")
    assert grown <= path.stat().st_size + LIMIT
