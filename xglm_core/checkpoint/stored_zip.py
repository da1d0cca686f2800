"""The directory of a zip archive whose members are not compressed, as PyTorch writes them.

`zipfile` cannot do this: it does not say where the bytes of a member lie, and reads a list of members of any size.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator

from xglm_core.checkpoint.tensor_file import shown
from xglm_core.errors import CheckpointError

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF  # The value of a 32-bit field whose number is in the 64-bit extension.
_MOST_BYTES = 2**22  # The largest XGLM needs an 80th of this.


def stored_members(data: mmap.mmap, damaged: Callable[[str], CheckpointError]) -> dict[str, tuple[int, int]]:
    """The byte range [begin, end) of each member of an archive, by name; no two overlap.

    Raises:
        CheckpointError: the archive is damaged or has a comment, or a member is compressed or encrypted.
    """
    begin, end = _directory(data, damaged)
    members: dict[str, tuple[int, int]] = {}
    places = []
    for name, header, size in _entries(data, begin, end, damaged):
        if name in members:
            raise damaged(f"the archive has two members {shown(name)}")
        body = _body(data, name, header, damaged)
        if body + size > begin:
            raise damaged(f"member {shown(name)}: ends at byte {body + size}, expected at most {begin}")
        members[name] = body, body + size
        places.append((header, body + size, name))
    position = 0
    for header, after, name in sorted(places):
        if header < position:
            raise damaged(
                f"member {shown(name)}: begins at byte {header}, expected {position}: it overlaps another one"
            )
        position = after
    return members


def _directory(data: mmap.mmap, damaged: Callable[[str], CheckpointError]) -> tuple[int, int]:
    """The byte range of the directory."""
    position = len(data) - _END.size
    truncated = damaged("the archive does not end with its directory; the file is truncated or has trailing bytes")
    if position < 0 or data[position : position + 4] != b"PK\5\6":
        raise truncated
    *_, size, offset, comment = _END.unpack_from(data, position)
    locator = position - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\6\7":
        _, _, position, _ = _LOCATOR.unpack_from(data, locator)
        if position > locator - _END64.size or data[position : position + 4] != b"PK\6\6":
            raise truncated
        *_, size, offset = _END64.unpack_from(data, position)
    if comment or offset + size > position:
        raise truncated
    if size > _MOST_BYTES:
        raise damaged(f"the directory of the archive has {size} bytes, expected at most {_MOST_BYTES}")
    return offset, offset + size


def _entries(
    data: mmap.mmap, position: int, end: int, damaged: Callable[[str], CheckpointError]
) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset of the local header, and size of each member."""
    while position < end:
        if position + _ENTRY.size > end or data[position : position + 4] != b"PK\1\2":
            raise damaged(f"the directory of the archive is damaged at byte {position}")
        entry = _ENTRY.unpack_from(data, position)
        flags, method, packed, size, lengths, header = entry[3], entry[4], entry[8], entry[9], entry[10:13], entry[16]
        text = position + _ENTRY.size
        position = text + sum(lengths)
        if position > end:
            raise damaged("the directory of the archive is cut short")
        name = data[text : text + lengths[0]].decode("utf-8", "replace")
        extra = data[text + lengths[0] : text + lengths[0] + lengths[1]]
        size, packed, header = _extended(extra, [size, packed, header])
        if method or flags & 1 or packed != size:
            raise damaged(f"member {shown(name)}: is compressed or encrypted; PyTorch stores tensors as they are")
        yield name, header, size


def _extended(extra: bytes, numbers: list[int]) -> list[int]:
    """The numbers of an entry; full ones are replaced by those of the 64-bit extension, in order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra[4 : 4 + length // 8 * 8].ljust(length, b"\0")))
            return [next(wide, number) if number == _FULL else number for number in numbers]
        extra = extra[4 + length :]
    return numbers


def _body(data: mmap.mmap, name: str, header: int, damaged: Callable[[str], CheckpointError]) -> int:
    """The offset of a member's bytes."""
    text = header + _LOCAL.size
    if text > len(data) or data[header : header + 4] != b"PK\3\4":
        raise damaged(f"member {shown(name)}: no header at byte {header}")
    *_, name_length, extra_length = _LOCAL.unpack_from(data, header)
    if data[text : text + name_length].decode("utf-8", "replace") != name:
        raise damaged(f"member {shown(name)}: has another name in its header at byte {header}")
    return text + int(name_length) + int(extra_length)
