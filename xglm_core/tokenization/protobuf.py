"""The wire format of Protocol Buffers, as far as SentencePiece's model files need it.

A message is a series of fields. A field has a key (its number and the form of its value) and a value. Concatenated
messages are one message, so fields can be removed and added without parsing the others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SHORT = [bytes([value]) for value in range(0x80)]


class Field(NamedTuple):
    """A field of a message: its number, its value, and the offsets in the message where it begins and ends."""

    number: int
    value: int | bytes  # Fixed-width numbers are kept as bytes.
    start: int
    stop: int


def fields(message: bytes) -> Iterator[Field]:
    """Yields the fields of a message, in order.

    Raises:
        ValueError: the bytes are not a message.
    """
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        number, form = key >> 3, key & 7
        value: int | bytes
        if form == _VARINT:
            value, position = _read_varint(message, position)
        else:
            if form == _BYTES:
                size, position = _read_varint(message, position)
            elif form in (_FIXED32, _FIXED64):
                size = 4 if form == _FIXED32 else 8
            else:
                raise ValueError(f"unknown form {form} of a field at byte {start}")
            value, position = message[position : position + size], position + size
            if position > len(message):
                raise ValueError(f"the field at byte {start} is cut off")
        yield Field(number, value, start, position)


def bytes_field(number: int, value: bytes) -> bytes:
    """Makes a field that holds bytes, text in UTF-8, or a message."""
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def int_field(number: int, value: int) -> bytes:
    """Makes a field that holds a non-negative integer, a bool or a member of an enumeration."""
    return _varint(number << 3 | _VARINT) + _varint(value)


def float_field(number: int, value: float) -> bytes:
    """Makes a field that holds a float32."""
    return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)


def float_value(value: int | bytes) -> float:
    """The number in a field that `float_field` made."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError(f"expected a float32, found {value!r}")
    number: float = struct.unpack("<f", value)[0]
    return number


def _varint(value: int) -> bytes:
    if value < 0x80:  # Fast path: nearly all of a million integers in a vocabulary.
        return _SHORT[value]
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Reads an integer; returns it and the position after it."""
    if position < len(message) and message[position] < 0x80:
        return message[position], position + 1
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"no integer at byte {position}")
