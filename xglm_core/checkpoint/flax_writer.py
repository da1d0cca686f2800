"""Writes `flax_model.msgpack` as `flax.serialization.to_bytes` does, without Flax or msgpack."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

from xglm_core.checkpoint.file_layout import Entry, Layout, Piece, Writer
from xglm_core.checkpoint.flax_msgpack import ARRAY_TYPE, CHUNKED

# The largest array in one piece, as in Flax; msgpack itself allows 4 GiB.
_MOST_BYTES = 2**30


def _lay_out(file: BinaryIO, entries: Sequence[Entry], sharded: bool) -> Layout:
    places: dict[str, list[Piece]] = {}

    def write(tree: dict[str, Any]) -> None:
        file.write(_map(len(tree)))
        for key, value in tree.items():
            file.write(_text(key))
            if isinstance(value, dict):
                write(value)
            else:
                places[value.name] = _write_entry(file, value)

    write(_tree(entries))
    return Layout([places[entry.name] for entry in entries])


def _tree(entries: Sequence[Entry]) -> dict[str, Any]:
    """The entries as maps of maps, by the parts of their names."""
    tree: dict[str, Any] = {}
    for entry in entries:
        *owners, last = entry.name.split("/")
        owner = tree
        for key in owners:
            owner = owner.setdefault(key, {})
        owner[last] = entry
    return tree


def _write_entry(file: BinaryIO, entry: Entry) -> list[Piece]:
    """Writes an array without its values, and returns the places for them."""
    if entry.nbytes <= _MOST_BYTES:
        return [_write_array(file, entry.shape, entry)]
    most = _MOST_BYTES // entry.dtype.storage.itemsize
    count = math.prod(entry.shape)
    file.write(_map(3) + _text(CHUNKED) + b"\xc3" + _text("shape") + _map(len(entry.shape)))  # 0xC3 is "true".
    for axis, size in enumerate(entry.shape):
        file.write(_text(str(axis)) + _integer(size))
    file.write(_text("chunks") + _map(-(-count // most)))
    pieces = []
    for index, begin in enumerate(range(0, count, most)):
        file.write(_text(str(index)))
        pieces.append(_write_array(file, (min(most, count - begin),), entry))
    return pieces


def _write_array(file: BinaryIO, shape: Sequence[int], entry: Entry) -> Piece:
    """Writes an array as an extension type: shape, name of the type, and room for the values."""
    size = math.prod(shape) * entry.dtype.storage.itemsize
    head = b"\x93" + _array(len(shape)) + b"".join(map(_integer, shape)) + _text(entry.dtype.name)
    head += b"\xc6" + size.to_bytes(4, "big")
    file.write(b"\xc9" + (len(head) + size).to_bytes(4, "big") + bytes([ARRAY_TYPE]) + head)
    begin = file.tell()
    file.seek(size, os.SEEK_CUR)
    return begin, size


# msgpack has several widths for a length. The widest fits always, and a file has only thousands of lengths.
def _map(count: int) -> bytes:
    return b"\xdf" + count.to_bytes(4, "big")


def _array(count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big")


def _text(text: str) -> bytes:
    data = text.encode()
    return b"\xdb" + len(data).to_bytes(4, "big") + data


def _integer(number: int) -> bytes:
    return b"\xcf" + number.to_bytes(8, "big")


FLAX_WRITER = Writer(_lay_out, stored_name=lambda spec: "/".join(spec.flax), transposes=True)
