"""Files of `torch.save`, without PyTorch: a pickle that describes tensors, and their values.

Since PyTorch 1.6 a file is a zip archive, `<any>/data.pkl` beside `<any>/data/<key>` for each storage. Older files are
a series of pickles (magic number, version, system, value, storage keys), then for each key a count and the values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from xglm_core.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INTEGERS
from xglm_core.checkpoint.stored_zip import stored_members
from xglm_core.checkpoint.tensor_file import TensorFile, TensorInfo, are_sizes, is_shape, shown
from xglm_core.checkpoint.tensor_pickle import MOST_BYTES, Storage, StoredTensor, TensorPickle
from xglm_core.weight_names import HEAD

_FLOATS = {"DoubleStorage": FLOAT64, "FloatStorage": FLOAT32, "HalfStorage": FLOAT16, "BFloat16Storage": BFLOAT16}
_INTEGERS = ("LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage")
_TYPES = {**_FLOATS, **dict(zip(_INTEGERS, INTEGERS, strict=True))}
_ITEM_BYTES = {kind: dtype.storage.itemsize for kind, dtype in _TYPES.items()}

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT_BYTES = 8


class TorchFile(TensorFile):
    """A state dict, or a list of parameters by name; see `TensorFile`.

    No code in the file is run: see `TensorPickle`.

    Attributes:
        contents: the pickled value, with tensors as `StoredTensor`.
    """

    allows_records = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, least=4)
        self._big_endian = False
        self._places: dict[str, int] = {}  # The offset of each storage's values.
        self.contents = self._open_zip() if self._map[:4] == b"PK\3\4" else self._open_legacy()
        for name, tensor in self._named_tensors().items():
            if not isinstance(tensor, StoredTensor):
                raise self._damaged(f"{shown(name)}: is a {type(tensor).__name__}, expected a tensor")
            self._add(name, self._tensor_info(name, tensor))
        # Tensors may share values, as a tied head does. But a small file must not become large in memory.
        sizes = {name: info.nbytes for name, info in (*self.tensors.items(), *self.others.items())}
        claimed = sum(sizes.values()) - max((size for name, size in sizes.items() if name.endswith(HEAD)), default=0)
        if claimed > self._size:
            raise self._damaged(f"the tensors have {claimed} bytes, but the file has {self._size}: they overlap")

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored type: a copy-on-write view of the file, unless its byte order differs."""
        array = super().read(name)
        return array.byteswap() if self._big_endian else array

    def _named_tensors(self) -> Mapping[str, Any]:
        """The tensors of the model in `contents`, by canonical name."""
        if not isinstance(self.contents, dict) or not all(isinstance(name, str) for name in self.contents):
            raise self._damaged(f"holds a {type(self.contents).__name__}, expected a dictionary of tensors by name")
        return self.contents

    def _open_zip(self) -> Any:
        members = stored_members(self._map, self._damaged)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise self._damaged(f"the archive has {len(pickles)} members '*/data.pkl', expected one")
        folder = pickles[0].removesuffix("data.pkl")
        pickle = self._pickle(*members[pickles[0]])
        begin, end = members.get(f"{folder}byteorder", (0, 0))
        order = self._map[begin : min(end, begin + 10)]
        if order not in (b"", b"little", b"big"):
            raise self._damaged(f"byteorder is {order!r}, expected 'little' or 'big'")
        self._big_endian = order == b"big"
        for key, storage in pickle.storages.items():
            begin, end = members.get(f"{folder}data/{key}", (0, -1))
            self._place(storage, begin, end - begin)
        return pickle.value

    def _open_legacy(self) -> Any:
        values: list[Any] = []
        storages: dict[str, Storage] = {}
        position = 0
        for _ in range(5):
            pickle = self._pickle(position, self._size)
            if not values and pickle.value != _MAGIC:
                break
            values.append(pickle.value)
            storages.update(pickle.storages)
            position += pickle.size
        if len(values) < 5 or values[:2] != [_MAGIC, _VERSION]:
            raise self._damaged("is neither a zip archive nor a file of older PyTorch (format 1001)")
        keys = values[4]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len({*keys}) < len(keys):
            raise self._damaged("the list of storages is damaged")
        if {*keys} != storages.keys():
            raise self._damaged(f"lists {len(keys)} storages, expected the {len(storages)} that its tensors use")
        for key in keys:
            stored = int.from_bytes(self._map[position : position + _COUNT_BYTES], "little")
            position += _COUNT_BYTES
            if stored != storages[key].count:
                raise self._damaged(f"storage {shown(key)}: has {stored} numbers, expected {storages[key].count}")
            size = stored * _ITEM_BYTES[storages[key].kind]
            self._place(storages[key], position, max(0, min(size, self._size - position)))
            position += size
        if position != self._size:
            raise self._damaged(f"the tensors end at byte {position}, but the file has {self._size}")
        return values[3]

    def _pickle(self, begin: int, end: int) -> TensorPickle:
        data = self._map[begin : min(end, begin + MOST_BYTES)]
        return TensorPickle(data, self._damaged, records=self.allows_records)

    def _place(self, storage: Storage, begin: int, size: int) -> None:
        expected = storage.count * _ITEM_BYTES[storage.kind]
        if size != expected:
            raise self._damaged(
                f"storage {shown(storage.key)}: {storage.count} numbers of {storage.kind} are {expected} bytes, "
                + (f"found {size}; the file is truncated or damaged" if size >= 0 else "but the file has none")
            )
        self._places[storage.key] = begin

    def _tensor_info(self, name: str, tensor: StoredTensor) -> TensorInfo:
        storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
        if tensor.flags:
            raise self._damaged(
                f"tensor {shown(name)}: is stored with the flags {shown(', '.join(map(str, tensor.flags)))}, which are "
                "not applied here; save what `tensor.resolve_neg()` of PyTorch returns"
            )
        if not is_shape(shape) or not are_sizes(strides) or not are_sizes([offset]) or len(shape) != len(strides):
            raise self._damaged(f"tensor {shown(name)}: expected offset, shape and strides as integers that fit")
        dtype, count = _TYPES[storage.kind], math.prod(shape)
        # Each element lies at `offset` plus the sum of index times stride.
        after = offset + (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if count else 0)
        # With repeated elements, a tensor could be larger in memory than any file.
        if after > storage.count or count > storage.count:
            raise self._damaged(
                f"tensor {shown(name)}: offset {offset}, shape {list(shape)} and strides {list(strides)} reach beyond "
                f"the {storage.count} numbers of its storage"
            )
        row_major = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        plain = not count or all(n == 1 or a == b for n, a, b in zip(shape, strides, row_major, strict=True))
        begin, item = self._places[storage.key], dtype.storage.itemsize
        return TensorInfo(
            dtype, tuple(shape), begin + offset * item, begin + after * item, None if plain else tuple(strides)
        )
