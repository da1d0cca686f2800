"""Writes tensors into a file that is laid out, and compares tensors.

Two threads work on a tensor each: numpy, zlib and the system run in parallel, as they release Python's lock. Meanwhile
the main thread makes the system write to the disk.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import zip_longest
from typing import BinaryIO, TypeVar

import numpy as np

from xglm_core.checkpoint.file_layout import Entry, Layout, Piece
from xglm_core.checkpoint.tensor_file import same_bits

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_THREADS = 2
_SYNC_SECONDS = 0.2  # Between two calls of fsync. Each has a cost, but the last one should not have much left to do.

# A function of the numbers of bytes that were written, and that were read back, since the last call.
Advance = Callable[[int, int], None]


def write_values(
    file: BinaryIO,
    entries: Sequence[Entry],
    layout: Layout,
    blocks: Callable[[int], Iterator[np.ndarray]],
    advance: Advance = lambda written, verified: None,
) -> None:
    """Writes the values of all entries into a file that is laid out.

    Args:
        file: open for writing.
        entries: the tensors.
        layout: where they lie in the file.
        blocks: yields the entry of an index in blocks of rows or columns; two threads call it.
        advance: is called with the progress, by these threads.
    """
    file.flush()

    def write(index: int) -> int:
        """Writes an entry; returns its CRC-32 if the format needs it."""
        entry = entries[index]
        checksum = count = 0
        with open(file.name, "r+b", buffering=0) as own:  # Each thread needs its own file position.
            for block in blocks(index):
                _check_block(entry, block)
                if layout.finish:
                    checksum = zlib.crc32(_bytes_of(block), checksum)
                _write_block(own, layout.places[index], entry, block, count)
                count += block.size
                advance(block.nbytes, 0)
        if count * entry.dtype.storage.itemsize != entry.nbytes:
            raise ValueError(f"{entry.name}: announced {entry.dtype.storage} {entry.shape}, got {count} numbers")
        return checksum

    checksums = in_threads(write, range(len(entries)), file)
    if layout.finish:
        layout.finish(checksums)
    file.flush()  # A full disk is noticed here, before any file is replaced.


def equal_values(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> bool:
    """Whether two arrays have the same bits; both are cut into blocks in the same way."""
    return all(
        first is not None and second is not None and same_bits(first, second)
        for first, second in zip_longest(ours, theirs)
    )


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item], file: BinaryIO) -> list[_Result]:
    """Calls `work` for each item in two threads, while the system writes a file to the disk; returns the results.

    After an error, no further item is begun; the first error is raised when the other thread is done.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            while (states := wait(futures, _SYNC_SECONDS, FIRST_EXCEPTION)).not_done:
                if any(future.exception() for future in states.done):
                    break
                os.fsync(file.fileno())
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _check_block(entry: Entry, block: np.ndarray) -> None:
    fits = len(entry.shape) < 2 or entry.shape[1:] == block.shape[1:] or entry.shape[:1] == block.shape[:1]
    if block.dtype != entry.dtype.storage or block.ndim != max(1, len(entry.shape)) or not fits:
        raise ValueError(
            f"{entry.name}: announced {entry.dtype.storage} {entry.shape}, got {block.dtype} {block.shape}"
        )


def _write_block(file: BinaryIO, pieces: Sequence[Piece], entry: Entry, block: np.ndarray, count: int) -> None:
    """Writes a block to its place, after `count` values of the entry."""
    item = block.itemsize
    if len(entry.shape) < 2 or block.shape[1:] == entry.shape[1:]:
        _write_at(file, pieces, count * item, _bytes_of(block))
        return
    rows, columns = entry.shape
    for row, values in enumerate(block):
        _write_at(file, pieces, (row * columns + count // rows) * item, _bytes_of(values))


def _write_at(file: BinaryIO, pieces: Sequence[Piece], position: int, data: memoryview) -> None:
    """Writes bytes at a position within an entry, which may be in several pieces of the file."""
    for begin, size in pieces:
        if data and position < size:
            part = data[: size - position]
            file.seek(begin + position)
            file.write(part)
            data = data[len(part) :]
            position = size
        position -= size


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
