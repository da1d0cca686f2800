"""The safetensors format, read and written with numpy alone.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. The header maps each
name to `dtype`, `shape` and `data_offsets` (begin and end within the bytes after the header). Nothing in a file is
trusted: the header must describe exactly the bytes that are there, once each, before any tensor is handed out.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xglm_core.checkpoint.dtypes import BY_CODE, FloatType
from xglm_core.errors import CheckpointError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # The limit of the reference implementation.
_METADATA = "__metadata__"
_MOST_DIMENSIONS = 32  # numpy has a limit too, which differs between its versions.
_LARGEST = 2**48  # Of a size, an offset or a number of elements; far from any overflow.


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: type, shape, and the byte range [begin, end) within the file."""

    dtype: FloatType
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A validated file, mapped into memory; tensors are views of the mapping.

    Views are copy-on-write: writing into one changes this process's memory, never the file. The file must not be
    truncated while views are in use; renaming another one over it, as `save_checkpoint` does, is safe.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file cannot be read, or its header does not describe its bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start, header = self._read_header(file, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged(f"{_METADATA} is {metadata!r}, expected an object of strings")
        self.tensors = {name: self._tensor_info(name, entry, start, size) for name, entry in header.items()}
        self._check_coverage(start, size)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a copy-on-write view of the file, in its stored type (bfloat16 as uint16 bit patterns)."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        return np.frombuffer(self._map, info.dtype.storage, count, offset=info.begin).reshape(info.shape)

    def release(self, name: str) -> None:
        """Gives the memory of a tensor's pages back to the system; the next use reads them from the file again.

        For readers that copied the tensor: whatever was written into a view of it is lost.
        """
        info = self.tensors[name]
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE  # Pages shared with a neighbour stay.
        length = info.end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def _read_header(self, file: Any, size: int) -> tuple[int, dict[str, Any]]:
        """Returns the offset of the first tensor byte, and the header."""
        if size < _LENGTH_BYTES:
            raise self._damaged(f"expected at least {_LENGTH_BYTES} bytes, found {size}; the file is truncated")
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise self._damaged(
                f"the header claims {length} bytes, but {size - _LENGTH_BYTES} follow (and at most {_MAX_HEADER_BYTES} "
                "are read); the file is truncated or is no safetensors file"
            )
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=self._unique_names)
        except CheckpointError:  # A name that is there twice.
            raise
        except (ValueError, RecursionError):
            raise self._damaged("the header is not JSON in UTF-8; the file is no safetensors file") from None
        if not isinstance(header, dict):
            raise self._damaged(f"the header is a {type(header).__name__}, expected an object")
        return _LENGTH_BYTES + length, header

    def _unique_names(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            raise self._damaged(f"the header names {next(n for n in names if names.count(n) > 1)!r} twice")
        return result

    def _tensor_info(self, name: str, entry: Any, start: int, size: int) -> TensorInfo:
        if not name.isprintable():  # Names are part of other messages, which must stay one line.
            raise self._damaged(f"the tensor name {name!r} is no printable text")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"tensor {name!r}: expected dtype, shape and data_offsets, found {entry!r}")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in BY_CODE:
            raise self._damaged(f"tensor {name!r}: dtype is {code!r}, expected one of {', '.join(BY_CODE)}")
        if not _are_sizes(shape) or math.prod(max(1, length) for length in shape) > _LARGEST:
            raise self._damaged(f"tensor {name!r}: shape is {shape!r}, expected a list of sizes")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"tensor {name!r}: data_offsets is {offsets!r}, expected [begin, end]")
        dtype, (begin, end) = BY_CODE[code], offsets
        expected = math.prod(shape) * dtype.storage.itemsize
        if end - begin != expected:
            raise self._damaged(
                f"tensor {name!r}: shape {shape} needs {expected} bytes, data_offsets hold {end - begin}"
            )
        if start + end > size:
            raise self._damaged(
                f"tensor {name!r}: ends at byte {start + end}, but the file has {size}; the file is truncated"
            )
        return TensorInfo(dtype, tuple(shape), start + begin, start + end)

    def _check_coverage(self, start: int, size: int) -> None:
        """Each byte after the header belongs to exactly one tensor."""
        position = start
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != position:
                kind = "overlaps another tensor" if info.begin < position else "leaves unnamed bytes before it"
                raise self._damaged(f"tensor {name!r}: begins at byte {info.begin}, expected {position}: it {kind}")
            position = info.end
        if position != size:
            raise self._damaged(f"the tensors end at byte {position}, but the file has {size}")

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason if len(reason) <= 300 else reason[:300] + '...'}")


def write_safetensors(
    file: BinaryIO,
    tensors: Sequence[tuple[str, FloatType, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes a file, holding one tensor in memory at a time.

    Args:
        file: open for writing.
        tensors: name, type and shape of each tensor.
        read: gives a tensor by name, in the stored type (see `FloatType.storage`) and the shape announced.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}  # transformers refuses files that do not name a framework.
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.storage.itemsize
        header[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # Keeps the tensors aligned to 8 bytes.
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
    file.write(text)
    for name, dtype, shape in tensors:
        array = read(name)
        if array.shape != shape or array.dtype != dtype.storage:
            raise ValueError(f"{name}: announced {dtype.storage} {shape}, got {array.dtype} {array.shape}")
        file.write(np.ascontiguousarray(array).data)
    file.flush()  # A full disk shows here, while nothing has been replaced yet.


def _are_sizes(values: Any) -> bool:
    """Whether `values` is a list of a few integers, none of them negative."""
    few = isinstance(values, list) and len(values) <= _MOST_DIMENSIONS
    return few and all(type(value) is int and 0 <= value <= _LARGEST for value in values)
