"""Reads and writes the safetensors format.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. The header maps each
name to `dtype`, `shape` and `data_offsets` (begin and end within the bytes after the header). Nothing in a file is
trusted: before any tensor is returned, the header must describe all bytes of the file, each exactly once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

from xglm_core.checkpoint.dtypes import BY_CODE, INT8, STORED
from xglm_core.checkpoint.file_layout import Entry, Layout, Writer
from xglm_core.checkpoint.tensor_file import ALIGNMENT, TensorFile, TensorInfo, are_sizes, is_shape, shown
from xglm_core.errors import CheckpointError

_LENGTH_BYTES = 8
# The reference implementation allows 100 MB. But JSON can take 30 times its size as Python objects, and this is 80
# times what the largest XGLM needs.
_MAX_HEADER_BYTES = 6_000_000
_METADATA = "__metadata__"


class SafetensorsFile(TensorFile):
    """A validated file; see `TensorFile`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, least=_LENGTH_BYTES)
        start, header = self._read_header()
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged(f"{_METADATA} is {metadata!r}, expected an object of strings")
        for name, entry in header.items():
            self._add(name, self._tensor_info(name, entry, start))
        self._check_coverage(start)

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        """Returns the offset of the first tensor byte, and the header."""
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        if length > min(_MAX_HEADER_BYTES, self._size - _LENGTH_BYTES):
            raise self._damaged(
                f"the header claims {length} bytes, but {self._size - _LENGTH_BYTES} follow (and at most "
                f"{_MAX_HEADER_BYTES} are read); the file is truncated or is not a safetensors file"
            )
        try:
            header = json.loads(
                self._map[_LENGTH_BYTES : _LENGTH_BYTES + length].decode(), object_pairs_hook=self._unique_names
            )
        except CheckpointError:  # A name occurs twice.
            raise
        except (ValueError, RecursionError):
            raise self._damaged("the header is not JSON in UTF-8; the file is not a safetensors file") from None
        if not isinstance(header, dict):
            raise self._damaged(f"the header is a {type(header).__name__}, expected an object")
        return _LENGTH_BYTES + length, header

    def _unique_names(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise self._damaged(f"the header names {shown(name)} twice")
            result[name] = value
        return result

    def _tensor_info(self, name: str, entry: Any, start: int) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"tensor {name!r}: expected dtype, shape and data_offsets, found {entry!r}")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in BY_CODE:
            raise self._damaged(f"tensor {name!r}: dtype is {code!r}, expected one of {', '.join(BY_CODE)}")
        if not is_shape(shape):
            raise self._damaged(f"tensor {name!r}: shape is {shape!r}, expected a list of sizes")
        if not are_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"tensor {name!r}: data_offsets is {offsets!r}, expected [begin, end]")
        dtype, (begin, end) = BY_CODE[code], offsets
        expected = math.prod(shape) * dtype.storage.itemsize
        if end - begin != expected:
            raise self._damaged(
                f"tensor {name!r}: shape {shape} needs {expected} bytes, data_offsets hold {end - begin}"
            )
        if start + end > self._size:
            raise self._damaged(
                f"tensor {name!r}: ends at byte {start + end}, but the file has {self._size}; the file is truncated"
            )
        return TensorInfo(dtype, tuple(shape), start + begin, start + end)

    def _check_coverage(self, start: int) -> None:
        """Checks that each byte after the header belongs to exactly one tensor."""
        position = start
        for name, info in sorted(
            {**self.tensors, **self.others}.items(), key=lambda item: (item[1].begin, item[1].end)
        ):
            if info.begin != position:
                kind = "overlaps another tensor" if info.begin < position else "leaves unnamed bytes before it"
                raise self._damaged(f"tensor {name!r}: begins at byte {info.begin}, expected {position}: it {kind}")
            position = info.end
        if position != self._size:
            raise self._damaged(f"the tensors end at byte {position}, but the file has {self._size}")


def _lay_out(file: BinaryIO, entries: Sequence[Entry], sharded: bool) -> Layout:
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}  # transformers refuses files that do not name a framework.
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype.code, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Aligns tensors in memory that are views of the file, if their sizes are multiples of this as well.
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    start = file.tell()
    return Layout([[(start + header[entry.name]["data_offsets"][0], entry.nbytes)] for entry in entries])


SAFETENSORS_WRITER = Writer(_lay_out, stored_name=lambda spec: spec.name, types=(*STORED.values(), INT8))
