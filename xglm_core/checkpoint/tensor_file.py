"""What the readers of all formats share: a file that is mapped into memory, and the places of its tensors."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from xglm_core.checkpoint.dtypes import INTEGERS, FloatType
from xglm_core.errors import CheckpointError
from xglm_core.files import POINTER, POINTER_REASON
from xglm_core.rounding import rounded_up

LARGEST = 2**48  # The largest size, offset or number of elements; far from any overflow.

_MOST_DIMENSIONS = 32  # numpy's own limit depends on its version.
# Tiles of so many rows and columns are transposed at a time: two fit into the processor's cache. The rows of the copy
# in between are longer, so that the values of a column do not compete for the same places of the cache.
_TILE = 256
_TILE_PADDING = 16
# So many values are read, converted and written at a time: they stay in the processor's cache.
_BLOCK_VALUES = 2**18
# So many values of a mapped tensor may be in memory at a time. A larger matrix is transposed in blocks of this size, so
# that a row of a block is many pages of the file: 2**22 takes twice the time of 2**24.
_MAPPED_VALUES = 2**24
ALIGNMENT = 64  # Bytes. TensorFlow and XLA copy memory that is aligned to less.
# With these limits, descriptions take tens of megabytes at most. The largest XGLM has 771 tensors, with names of 60
# characters.
_MOST_TENSORS = 50_000
_LONGEST_NAME = 500


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        dtype: the stored type.
        shape: the canonical shape, which a format may store transposed.
        begin, end: the byte range of the values within the file.
        strides: the distance between elements in each dimension, in elements; None for row-major order.
    """

    dtype: FloatType
    shape: tuple[int, ...]
    begin: int
    end: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The number of bytes of the values, without gaps."""
        return math.prod(self.shape) * self.dtype.storage.itemsize


class TensorFile:
    """A file mapped into memory; tensors are views of the mapping.

    Views are copy-on-write: writing into one changes this process's memory, never the file. The file must not be
    truncated while views are in use. Renaming another file over it, as `save_checkpoint` does, is safe.

    Args:
        path: the file.
        least: the smallest size of a file of the format, in bytes.

    Attributes:
        path: the file.
        tensors: the tensors by name. A subclass adds them with names and shapes of the published PyTorch checkpoints.
        others: tensors of integers, which are not weights.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds anything but tensors.
    """

    def __init__(self, path: str | os.PathLike[str], least: int) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, TensorInfo] = {}
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                if self._size < least:
                    raise self._damaged(
                        f"expected at least {least} bytes, found {self._size}; the file is truncated or of another kind"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if self._map[: len(POINTER)] == POINTER:
            raise self._damaged(POINTER_REASON)

    @staticmethod
    def canonical_name(name: str) -> str:
        """The name in `tensors` for a name in an index file."""
        return name

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor."""
        return self.tensors[name] if name in self.tensors else self.others[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a copy-on-write view of the file, in its stored type (bfloat16 as uint16 bit patterns)."""
        info = self.info(name)
        storage = info.dtype.storage
        strides = None if info.strides is None else tuple(stride * storage.itemsize for stride in info.strides)
        return np.ndarray(info.shape, storage, self._map, info.begin, strides)

    def blocks(self, name: str, buffers: Buffers, *, transposed: bool) -> Iterator[np.ndarray]:
        """Yields the tensor in blocks, see `row_blocks`; frees pages of the file after every few million values."""
        array, count = self.read(name), 0
        owner: Any = array.base  # The mapped file, unless the reader made a copy.
        if is_large(array.shape) and array.T.flags.c_contiguous and owner is self._map:
            yield from self._blocks_across(self.info(name), buffers, transposed=transposed)
            return
        for block in row_blocks(array, buffers, transposed=transposed):
            yield block
            count += block.size
            if count >= _MAPPED_VALUES:
                self.release(name)
                count = 0
        self.release(name)

    def _blocks_across(self, info: TensorInfo, buffers: Buffers, *, transposed: bool) -> Iterator[np.ndarray]:
        """Yields a large matrix that is stored transposed; each block holds a part of all rows of the file.

        The file is read, not mapped: to access one value, Linux may map megabytes, and in the end the whole matrix.
        """
        (rows, width), storage = info.shape, info.dtype.storage
        step = block_rows(info.shape, transposed=transposed)
        most = max(1, _MAPPED_VALUES // width // step) * step
        memory = Buffers()
        with open(self.path, "rb", buffering=0) as file:
            for begin in range(0, rows, most):
                part = memory.array((width, min(most, rows - begin)), storage)
                for index, values in enumerate(part):
                    file.seek(info.begin + (index * rows + begin) * storage.itemsize)
                    if file.readinto(values.view(np.uint8)) < values.nbytes:
                        raise self._damaged("ends before its tensors; was it changed meanwhile?")
                for first in range(0, part.shape[1], step):
                    yield ordered(part.T[first : first + step], buffers, transposed=transposed)

    def release(self, name: str) -> None:
        """Frees the memory of a tensor's pages; the next access reads the file again.

        Only for readers that copied the tensor: changes to a view of it are lost.
        """
        info = self.info(name)
        self._release(info.begin, info.end)

    def _release(self, begin: int, end: int) -> None:
        begin = rounded_up(begin, mmap.PAGESIZE)  # Pages that are shared with a neighbour stay.
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def _add(self, name: str, info: TensorInfo) -> None:
        """Adds a tensor; its name must be new."""
        if len(name) > _LONGEST_NAME:
            raise self._damaged(f"tensor {shown(name)}: its name has more than {_LONGEST_NAME} characters")
        if not name.isprintable():  # Names are part of messages, which must stay one line.
            raise self._damaged(f"the tensor name {shown(name)} is not printable text")
        if name in self.tensors or name in self.others:
            raise self._damaged(f"the file has two tensors {shown(name)}")
        if len(self.tensors) + len(self.others) == _MOST_TENSORS:
            raise self._damaged(f"the file has more than {_MOST_TENSORS} tensors")
        (self.others if info.dtype in INTEGERS else self.tensors)[name] = info

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason if len(reason) <= 300 else reason[:300] + '...'}")


def matrix_info(dtype: FloatType, shape: Sequence[int], begin: int, *, transposed: bool) -> TensorInfo:
    """A tensor that is stored in the row-major order of `shape`; with `transposed`, its transpose is canonical."""
    end = begin + math.prod(shape) * dtype.storage.itemsize
    if transposed and len(shape) == 2:
        return TensorInfo(dtype, (shape[1], shape[0]), begin, end, (1, shape[1]))
    return TensorInfo(dtype, tuple(shape), begin, end)


def copy_values(target: np.ndarray, source: np.ndarray) -> None:
    """Copies an array into a row-major one of the same shape.

    From a matrix that is stored transposed, numpy would read values that lie far apart, one by one. By way of tiles
    that stay in the processor's cache, the copy takes a fifth of the time or less.
    """
    if source.ndim != 2 or source.strides[0] >= source.strides[1]:
        np.copyto(target, source)
        return
    memory = np.empty((_TILE, _TILE + _TILE_PADDING), source.dtype)
    for row in range(0, source.shape[0], _TILE):
        for column in range(0, source.shape[1], _TILE):
            place = slice(row, row + _TILE), slice(column, column + _TILE)
            stored = source[place].T  # In the order of the file.
            tile = memory[: stored.shape[0], : stored.shape[1]]
            np.copyto(tile, stored)
            np.copyto(target[place], tile.T)


class Buffers(threading.local):
    """Reuses memory for one array after another, in each thread: fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialised array, in the memory of the last one."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised row-major array, at an address that is a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array has the layout and alignment of `aligned_empty`."""
    return array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0


def row_blocks(array: np.ndarray, buffers: Buffers, *, transposed: bool) -> Iterator[np.ndarray]:
    """Cuts an array into blocks of a few hundred thousand values, along its first dimension.

    Args:
        array: in canonical shape, in any order.
        buffers: memory for blocks that must be reordered.
        transposed: whether to transpose a matrix first. Blocks of a large matrix are columns of the transpose.

    Yields:
        Row-major blocks. Where they begin depends only on the shape and on `transposed`.
    """
    if not array.size:
        return
    if array.ndim == 0:
        array = array.reshape(1)
    if transposed and not is_large(array.shape):
        array, transposed = array.T, False
    step = block_rows(array.shape, transposed=transposed)
    for begin in range(0, len(array), step):
        yield ordered(array[begin : begin + step], buffers, transposed=transposed)


def block_rows(shape: Sequence[int], *, transposed: bool) -> int:
    """The number of rows in a block of a large matrix, or of an array that is not transposed."""
    return max(1, (_MAPPED_VALUES if transposed else _BLOCK_VALUES) // math.prod(shape[1:]))


def ordered(block: np.ndarray, buffers: Buffers, *, transposed: bool) -> np.ndarray:
    """A block, or its transpose, in row-major order."""
    block = block.T if transposed else block
    if block.flags.c_contiguous:
        return block
    copy = buffers.array(block.shape, block.dtype)
    copy_values(copy, block)
    return copy


def is_large(shape: Sequence[int]) -> bool:
    """Whether a matrix of this shape is too large to be mapped as a whole while it is transposed."""
    return len(shape) == 2 and math.prod(shape) > _MAPPED_VALUES


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two row-major arrays of one type and shape have the same bits; so NaN equals itself."""
    bits = f"u{first.itemsize}"
    return first.dtype == second.dtype and np.array_equal(first.view(bits), second.view(bits))


def are_sizes(values: Any) -> TypeGuard[Sequence[int]]:
    """Whether `values` is a list or tuple of a few integers, none of them negative."""
    few = isinstance(values, list | tuple) and len(values) <= _MOST_DIMENSIONS
    return few and all(type(value) is int and 0 <= value <= LARGEST for value in values)


def is_shape(values: Any) -> TypeGuard[Sequence[int]]:
    """Whether `values` can be a tensor's shape, even without its dimensions of size 0."""
    return are_sizes(values) and math.prod(max(1, length) for length in values) <= LARGEST


def shown(text: str) -> str:
    """A text from a file for a message: quoted, shortened and printable."""
    return repr(text if len(text) <= 100 else text[:100] + "...")
