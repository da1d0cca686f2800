"""Files of the TensorFlow classes of transformers, `tf_model.h5`, without TensorFlow.

h5py finds the datasets. Their values are read by mapping the file, as in the other formats. A dataset is called, for
example, "model/tfxglm_for_causal_lm/model/layers.0/fc1/kernel:0".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from xglm_core.checkpoint.dtypes import FLOAT16, FLOAT32, FLOAT64, INTEGERS
from xglm_core.checkpoint.tensor_file import TensorFile, TensorInfo, is_shape, matrix_info, shown
from xglm_core.errors import BackendError, CheckpointError
from xglm_core.weight_names import canonical_name

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_TYPES = {dtype.storage: dtype for dtype in (FLOAT16, FLOAT32, FLOAT64, *INTEGERS)}
_MOST_DEPTH = 16
_MOST_ENTRIES = 20_000  # Groups and datasets; the largest XGLM has 4,000.


class KerasFile(TensorFile):
    """A tree of datasets; see `TensorFile`.

    Raises:
        BackendError: h5py is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, least=len(_SIGNATURE))
        if self._map[: len(_SIGNATURE)] != _SIGNATURE:
            raise self._damaged("does not begin as an HDF5 file")
        h5py = import_h5py(self.path)
        self._entries = 0
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                for name, dataset in self._datasets(file, (), h5py):
                    self._add(*self._tensor(name, dataset))
        except CheckpointError:
            raise
        except MemoryError:
            raise self._damaged("the tree of the file is damaged: it claims sizes that no memory holds") from None
        except Exception as error:  # HDF5 and h5py have no closed list of what a damaged file raises.
            raise self._damaged(f"the tree of the file is damaged: {shown(str(error))}") from None
        self._check_overlaps()

    @staticmethod
    def canonical_name(name: str) -> str:
        """The name in `tensors` for a name in an index file."""
        return _canonical(name)[0]

    def _datasets(self, group: Any, place: tuple[str, ...], h5py: Any) -> Iterator[tuple[str, Any]]:
        """The names and datasets below a group."""
        if len(place) > _MOST_DEPTH:  # A group may contain itself.
            raise self._damaged(f"{shown('/'.join(place))}: expected at most {_MOST_DEPTH} levels")
        for key in group:
            self._entries += 1
            inner = (*place, str(key))
            name = "/".join(inner)
            if self._entries > _MOST_ENTRIES:
                raise self._damaged(f"the file has more than {_MOST_ENTRIES} groups and datasets")
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise self._damaged(f"{shown(name)}: is a link to another place or file, expected a dataset")
            value = group[key]
            if isinstance(value, h5py.Group):
                yield from self._datasets(value, inner, h5py)
            elif isinstance(value, h5py.Dataset):
                yield name, value
            else:
                raise self._damaged(f"{shown(name)}: is a {type(value).__name__}, expected a dataset")

    def _tensor(self, stored: str, dataset: Any) -> tuple[str, TensorInfo]:
        name, transposed = _canonical(stored)
        dtype, shape = _TYPES.get(np.dtype(dataset.dtype)), dataset.shape
        if dtype is None:
            raise self._damaged(f"{shown(stored)}: is of {dataset.dtype}, expected float16, float32 or float64")
        sizes = None if shape is None else tuple(int(size) for size in shape)
        if not is_shape(sizes):
            raise self._damaged(f"{shown(stored)}: shape is {sizes}, expected sizes that fit")
        begin = dataset.id.get_offset()
        info = matrix_info(dtype, sizes, begin or 0, transposed=transposed)
        # None means: in pieces, compressed, in another file, or never written. Keras writes the last for empty ones.
        if begin is None and info.nbytes:
            raise self._damaged(f"{shown(stored)}: is in pieces, compressed or never written, expected plain numbers")
        if info.end > self._size:
            raise self._damaged(
                f"{shown(stored)}: ends at byte {info.end}, but the file has {self._size}; the file is truncated"
            )
        return name, info

    def _check_overlaps(self) -> None:
        position = 0
        for name, info in sorted({**self.tensors, **self.others}.items(), key=lambda item: item[1].begin):
            if info.begin < position and info.nbytes:
                raise self._damaged(f"tensor {shown(name)}: begins at byte {info.begin}, within another tensor")
            position = max(position, info.end)


def import_h5py(path: str | os.PathLike[str]) -> Any:
    """Imports h5py; raises a `BackendError` that names the file."""
    try:
        import h5py
    except ImportError:
        raise BackendError(f"{path}: needs h5py, not installed here; run: pip install 'xglm[h5]'") from None
    return h5py


def _canonical(stored: str) -> tuple[str, bool]:
    """The canonical name of a dataset, and whether its matrix is transposed."""
    path = stored.removesuffix(":0").split("/")
    # Scopes repeat the names of layers. The name proper begins at the last "model" or "lm_head".
    begin = max((index for index, part in enumerate(path) if part in ("model", "lm_head")), default=0)
    # transformers calls the embedding "weight", as PyTorch does.
    return canonical_name(path[begin:])
