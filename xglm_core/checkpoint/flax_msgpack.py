"""Files of `flax.serialization.to_bytes`, without Flax, JAX or msgpack.

A file is one msgpack map of maps, down to arrays: extension type 1, whose bytes are a msgpack array of shape, type name
and values. An array above 1 GiB is a map with its shape and flat pieces. This needs a dozen type
codes of msgpack, so the reader has its own parser: it records where the values lie and copies none. The `msgpack`
package would hold the whole file in memory twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Never

import numpy as np

from xglm_core.checkpoint.dtypes import INTEGERS, STORED, FloatType
from xglm_core.checkpoint.tensor_file import (
    Buffers,
    TensorFile,
    TensorInfo,
    block_rows,
    is_large,
    is_shape,
    matrix_info,
    ordered,
    shown,
)
from xglm_core.weight_names import canonical_name

_TYPES = STORED | {dtype.name: dtype for dtype in INTEGERS}
CHUNKED = "__msgpack_chunked_array__"
ARRAY_TYPE = 1

_MOST_DEPTH = 16
_MOST_ENTRIES = 100_000  # In all maps together.
_LONGEST_KEY = 255

# First byte -> kind of value, and the number of bytes of its length, or of the number itself.
_CODES = {
    first + index: (kind, width)
    for first, kind, widths in (
        (0xC2, "bool", (0, 0)),
        (0xC4, "bin", (1, 2, 4)),
        (0xC7, "ext", (1, 2, 4)),
        (0xCC, "int", (1, 2, 4, 8)),
        (0xD9, "str", (1, 2, 4)),
        (0xDC, "array", (2, 4)),
        (0xDE, "map", (2, 4)),
    )
    for index, width in enumerate(widths)
}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclass(frozen=True)
class _Array:
    """An array in the file."""

    dtype: FloatType
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * self.dtype.storage.itemsize


class FlaxFile(TensorFile):
    """A tree of parameters; see `TensorFile`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, least=1)
        self._position = 0
        self._entries = 0
        self._pieces: dict[str, list[_Array]] = {}
        tree = self._value(())
        if not isinstance(tree, dict):
            raise self._damaged("expected a map of parameters")
        if self._position != self._size:
            raise self._damaged(f"the parameters end at byte {self._position}, but the file has {self._size}")
        for place, leaf in _leaves(tree, ()):
            self._add_leaf(place, leaf)

    @staticmethod
    def canonical_name(name: str) -> str:
        """The name in `tensors` for a name in an index file, such as "model/layers/0/fc1/kernel"."""
        return canonical_name(name.split("/"))[0]

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored type: a copy-on-write view of the file, or a copy if it is stored in pieces."""
        info = self.info(name)
        if name not in self._pieces:
            return super().read(name)
        values = self._values(name, 0, math.prod(info.shape))
        return values.reshape(info.shape) if info.strides is None else values.reshape(info.shape[::-1]).T

    def blocks(self, name: str, buffers: Buffers, *, transposed: bool) -> Iterator[np.ndarray]:
        """See `TensorFile.blocks`. A large matrix in pieces is joined block by block."""
        info = self.info(name)
        if name not in self._pieces or info.strides is not None or not is_large(info.shape):
            yield from super().blocks(name, buffers, transposed=transposed)
            return
        rows, width = info.shape
        step = block_rows(info.shape, transposed=transposed)
        for begin in range(0, rows, step):
            values = self._values(name, begin * width, min(begin + step, rows) * width)
            yield ordered(values.reshape(-1, width), buffers, transposed=transposed)

    def _values(self, name: str, begin: int, end: int) -> np.ndarray:
        """A copy of some values of a tensor that is stored in pieces."""
        dtype = self.info(name).dtype.storage
        result = np.empty(end - begin, dtype)
        position = 0
        for piece in self._pieces[name]:
            (count,) = piece.shape
            first, last = max(begin, position), min(end, position + count)
            if first < last:
                place = piece.begin + (first - position) * dtype.itemsize
                result[first - begin : last - begin] = np.frombuffer(self._map, dtype, last - first, place)
                self._release(place, place + (last - first) * dtype.itemsize)
            position += count
        return result

    def _add_leaf(self, place: tuple[str, ...], leaf: Any) -> None:
        name, transposed = canonical_name(place)
        if isinstance(leaf, dict):
            leaf, pieces = self._joined(place, leaf)
            self._pieces[name] = pieces
            end = pieces[-1].end if pieces else leaf.begin
        elif isinstance(leaf, _Array):
            end = leaf.end
        else:
            self._refuse(place, f"is a {type(leaf).__name__}, expected an array")
        info = matrix_info(leaf.dtype, leaf.shape, leaf.begin, transposed=transposed)
        self._add(name, TensorInfo(info.dtype, info.shape, info.begin, end, info.strides))

    def _joined(self, place: tuple[str, ...], leaf: dict[str, Any]) -> tuple[_Array, list[_Array]]:
        """An array that is stored in pieces, as if it were all at the first piece; and the pieces."""
        shape, pieces = leaf.get("shape"), leaf.get("chunks")
        if not isinstance(shape, dict) or not isinstance(pieces, dict) or len(leaf) != 3:
            self._refuse(place, "expected a shape and chunks")
        for numbered in (shape, pieces):
            if [*numbered] != [str(index) for index in range(len(numbered))]:
                self._refuse(place, "shape and chunks are not numbered from 0 on")
        sizes, arrays = [*shape.values()], [*pieces.values()]
        if not is_shape(sizes) or not all(isinstance(array, _Array) and len(array.shape) == 1 for array in arrays):
            self._refuse(place, "expected sizes and flat chunks")
        found = sum(array.shape[0] for array in arrays)
        if not arrays or len({array.dtype.name for array in arrays}) > 1 or found != math.prod(sizes):
            self._refuse(place, f"shape {sizes} needs {math.prod(sizes)} numbers of one type, the chunks have {found}")
        return _Array(arrays[0].dtype, tuple(sizes), arrays[0].begin), arrays

    def _value(self, place: tuple[str, ...]) -> Any:
        """The next value: a number, a map, or an array."""
        kind, size = self._header(place)
        if kind in ("int", "bool"):
            return size
        if kind == "map":
            return self._map_of(place, size)
        if kind == "ext":
            return self._array(place, size)
        return self._refuse(place, f"is of the msgpack type {kind}, expected a map or an array")

    def _map_of(self, place: tuple[str, ...], count: int) -> dict[str, Any]:
        self._entries += count
        if self._entries > _MOST_ENTRIES or len(place) == _MOST_DEPTH:
            self._refuse(place, f"expected at most {_MOST_ENTRIES} entries and {_MOST_DEPTH} levels")
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(place)
            if key in result:
                self._refuse(place, f"has two entries {shown(key)}")
            result[key] = self._value((*place, key))
        return result

    def _array(self, place: tuple[str, ...], size: int) -> _Array:
        kind = self._take(1)[0]
        end = self._position + size
        if kind != ARRAY_TYPE:
            self._refuse(place, f"is of the extension type {kind}, expected an array (type {ARRAY_TYPE})")
        parts, dimensions = self._expect("array", place), self._expect("array", place)
        shape = [self._expect("int", place) for _ in range(min(dimensions, 64))]
        dtype, length = _TYPES.get(self._text(place)), self._expect("bin", place)
        begin = self._position
        if parts != 3 or not is_shape(shape):
            self._refuse(place, "expected shape, type and numbers")
        if dtype is None:
            self._refuse(place, f"has another type, expected one of {', '.join(_TYPES)}")
        array = _Array(dtype, tuple(shape), begin)
        if array.end - begin != length or begin + length != end:
            self._refuse(place, f"shape {shape} of {dtype.name} needs {array.end - begin} bytes, found {length}")
        if end > self._size:
            self._refuse(place, f"ends at byte {end}, but the file has {self._size}; the file is truncated")
        self._position = end
        return array

    def _text(self, place: tuple[str, ...]) -> str:
        length = self._expect("str", place)
        if length > _LONGEST_KEY:
            self._refuse(place, f"has a text of {length} bytes, expected at most {_LONGEST_KEY}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._refuse(place, "has a text that is not UTF-8")

    def _expect(self, kind: str, place: tuple[str, ...]) -> int:
        found, size = self._header(place)
        if found != kind:
            self._refuse(place, f"has a value of the msgpack type {found}, expected {kind}")
        return size

    def _header(self, place: tuple[str, ...]) -> tuple[str, int]:
        """The kind of the next value, and its length, its number of entries, or the number itself."""
        code = self._take(1)[0]
        if code < 0x80:
            return "int", code
        if code < 0xC0:
            return (
                ("map", code & 0xF) if code < 0x90 else ("array", code & 0xF) if code < 0xA0 else ("str", code & 0x1F)
            )
        if code in _FIXED_EXT:
            return "ext", _FIXED_EXT[code]
        if code not in _CODES:
            self._refuse(place, f"has a value of the msgpack code {code:#x}, which no checkpoint needs")
        kind, width = _CODES[code]
        return kind, int.from_bytes(self._take(width), "big")

    def _take(self, count: int) -> bytes:
        begin = self._position
        self._position += count
        if self._position > self._size:
            raise self._damaged(f"ends within a value at byte {begin}; the file is truncated")
        return self._map[begin : self._position]

    def _refuse(self, place: tuple[str, ...], reason: str) -> Never:
        raise self._damaged(f"parameter {shown('/'.join(place))}: {reason}")


def _leaves(tree: dict[str, Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and CHUNKED not in value:
            yield from _leaves(value, (*place, key))
        else:
            yield (*place, key), value
