"""Writes `tf_model.h5` as the TensorFlow classes of transformers 4 read it, without TensorFlow.

h5py makes the tree of the file and reserves space; the values are written as in the other formats. A single file has a
group for each of the model's two layers, which lists its weights. A shard has a group for each weight, and lists all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from xglm_core.checkpoint.dtypes import FLOAT16, FLOAT32, FLOAT64
from xglm_core.checkpoint.file_layout import Entry, Layout, Writer
from xglm_core.checkpoint.keras_h5 import import_h5py
from xglm_core.weight_names import WeightSpec

_SCOPE = "tfxglm_for_causal_lm"  # The first part of a variable's name. Readers drop it, whatever it is.
_ALIGNMENT = 64  # Bytes. TensorFlow copies memory that is aligned to less.
_MOST_BYTES = 64512  # Keras' limit for an attribute, above which it writes several numbered ones.


def _stored_name(spec: WeightSpec) -> str:
    """The variable's name in transformers, which calls the embedding "weight", as PyTorch does."""
    return f"{_SCOPE}/{spec.keras.replace('embed_tokens/embeddings', 'embed_tokens/weight')}:0"


def _lay_out(file: BinaryIO, entries: Sequence[Entry], sharded: bool) -> Layout:
    h5py = import_h5py("tf_model.h5")
    options = {"alignment_threshold": _ALIGNMENT, "alignment_interval": _ALIGNMENT, "locking": False}
    with h5py.File(file.name, "w", **options) as tree:
        if sharded:
            datasets = [_add(tree, entry.name.partition("/")[2], entry, h5py) for entry in entries]
            _set_names(tree, "layer_names", [entry.name.partition("/")[2] for entry in entries])
        else:
            layers = dict.fromkeys(entry.name.split("/")[1] for entry in entries)
            for layer in layers:
                names = [entry.name for entry in entries if entry.name.split("/")[1] == layer]
                _set_names(tree.create_group(layer), "weight_names", names)
            datasets = [_add(tree[entry.name.split("/")[1]], entry.name, entry, h5py) for entry in entries]
            _set_names(tree, "layer_names", list(layers))
            tree.attrs["backend"] = "tensorflow"
        tree.flush()
        return Layout([[(dataset.id.get_offset() or 0, entry.nbytes)] for dataset, entry in datasets])


def _add(group: Any, name: str, entry: Entry, h5py: Any) -> tuple[Any, Entry]:
    """Adds a dataset, whose space is reserved in one piece and not filled."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return group.create_dataset(name, entry.shape, entry.dtype.storage, dcpl=properties), entry


def _set_names(group: Any, attribute: str, names: Sequence[str]) -> None:
    encoded = np.array([name.encode() for name in names])
    parts = -(-encoded.nbytes // _MOST_BYTES)
    for index, part in enumerate(np.array_split(encoded, parts)):
        group.attrs[attribute if parts == 1 else f"{attribute}{index}"] = part


KERAS_WRITER = Writer(_lay_out, _stored_name, transposes=True, untied_head=True, types=(FLOAT32, FLOAT16, FLOAT64))
