"""Writes `pytorch_model.bin` as `torch.save` does, without PyTorch: a zip archive of a pickle and plain values."""

from __future__ import annotations

import math
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from xglm_core.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from xglm_core.checkpoint.file_layout import Entry, Layout, Writer

_STORAGES = {FLOAT64: "DoubleStorage", FLOAT32: "FloatStorage", FLOAT16: "HalfStorage", BFLOAT16: "BFloat16Storage"}
_ALIGNMENT = 64  # The alignment of values in bytes, as in PyTorch.

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_FULL = 0xFFFFFFFF  # The value of a 32-bit field whose number is in the 64-bit extension.
_VERSION = 45  # Zip 4.5: the first version with 64-bit sizes.
_UTF8 = 0x800  # The flag for names in UTF-8.
_FIRST_DAY = 0x21  # 1980-01-01, so that equal weights make equal files.


@dataclass(frozen=True)
class _Member:
    """One file of the archive: its name, where its header begins, its size and its CRC-32."""

    name: bytes
    begin: int
    size: int
    crc: int = 0


def _lay_out(file: BinaryIO, entries: Sequence[Entry], sharded: bool) -> Layout:
    texts = (("data.pkl", _pickle(entries)), ("byteorder", b"little"), ("version", b"3\n"))
    small = [_write_member(file, name, body) for name, body in texts]
    members, places, end = [], [], file.tell()
    for key, entry in enumerate(entries):
        members.append(_Member(f"archive/data/{key}".encode(), end, entry.nbytes))
        begin = end + len(_local_header(members[-1]))
        places.append([(begin, entry.nbytes)])
        end = begin + entry.nbytes

    def finish(checksums: Sequence[int]) -> None:
        finished = [replace(member, crc=crc) for member, crc in zip(members, checksums, strict=True)]
        for member in finished:
            file.seek(member.begin)
            file.write(_local_header(member))
        file.seek(end)
        file.write(_directory([*small, *finished], end))

    return Layout(places, finish)


def _write_member(file: BinaryIO, name: str, body: bytes) -> _Member:
    member = _Member(f"archive/{name}".encode(), file.tell(), len(body), zlib.crc32(body))
    file.write(_local_header(member) + body)
    return member


def _local_header(member: _Member) -> bytes:
    """The header before a member's bytes, padded so that these are aligned."""
    large = member.size >= _FULL
    size = _FULL if large else member.size
    extra = struct.pack("<2H2Q", 1, 16, member.size, member.size) if large else b""
    begin = member.begin + _LOCAL.size + len(member.name) + len(extra) + 4
    padding = -begin % _ALIGNMENT
    extra += struct.pack("<2s1H", b"FB", padding) + b"Z" * padding  # PyTorch's name for its padding.
    fields = (_VERSION, _UTF8, 0, 0, _FIRST_DAY, member.crc, size, size, len(member.name), len(extra))
    return _LOCAL.pack(b"PK\3\4", *fields) + member.name + extra


def _directory(members: Sequence[_Member], begin: int) -> bytes:
    """The directory and the end of the archive."""
    entries = b"".join(map(_directory_entry, members))
    count, size = len(members), len(entries)
    end64 = _END64.pack(b"PK\6\6", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, begin)
    locator = _LOCATOR.pack(b"PK\6\7", 0, begin + size, 1)
    few = min(count, 0xFFFF)
    return entries + end64 + locator + _END.pack(b"PK\5\6", 0, 0, few, few, size, min(begin, _FULL), 0)


def _directory_entry(member: _Member) -> bytes:
    large = [number for number in (member.size, member.size, member.begin) if number >= _FULL]
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    size, begin = min(member.size, _FULL), min(member.begin, _FULL)
    fields = (_VERSION, _VERSION, _UTF8, 0, 0, _FIRST_DAY, member.crc, size, size, len(member.name), len(extra))
    return _ENTRY.pack(b"PK\1\2", *fields, 0, 0, 0, 0, begin) + member.name + extra


def _pickle(entries: Sequence[Entry]) -> bytes:
    """A dictionary of tensors by name.

    It is written instruction by instruction: the `pickle` module would import the named classes, and so PyTorch.
    """
    items = b"".join(
        _text(entry.name)
        + _name("torch._utils", "_rebuild_tensor_v2")
        + _tuple(
            _tuple(
                _text("storage"),
                _name("torch", _STORAGES[entry.dtype]),
                _text(str(key)),
                _text("cpu"),
                _integer(math.prod(entry.shape)),
            )
            + pickle.BINPERSID,
            _integer(0),  # The offset in the storage.
            _tuple(*map(_integer, entry.shape)),
            _tuple(*(_integer(math.prod(entry.shape[axis + 1 :])) for axis in range(len(entry.shape)))),
            pickle.NEWFALSE,  # No gradient.
            _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,  # No hooks.
        )
        + pickle.REDUCE
        for key, entry in enumerate(entries)
    )
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _integer(number: int) -> bytes:
    data = pickle.encode_long(number)
    return pickle.LONG1 + len(data).to_bytes(1, "little") + data


def _tuple(*values: bytes) -> bytes:
    return pickle.MARK + b"".join(values) + pickle.TUPLE


TORCH_WRITER = Writer(_lay_out, stored_name=lambda spec: spec.name)
