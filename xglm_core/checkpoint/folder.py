"""Checkpoint folders: `config.json` beside weights in any of the published formats; written as safetensors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Unpack

import numpy as np

from xglm_core.checkpoint.dtypes import FloatType, convert
from xglm_core.checkpoint.fairseq import FairseqFile
from xglm_core.checkpoint.formats import FORMATS, fetch_weights, find_format, open_files, shortened
from xglm_core.checkpoint.mapped import TensorFile, TensorInfo
from xglm_core.checkpoint.safetensors import write_safetensors
from xglm_core.config import CONFIG_FILE, GENERATION_CONFIG_FILE, XGLMConfig
from xglm_core.errors import CheckpointError, InputError
from xglm_core.files import replacing
from xglm_core.hub import HubOptions, Source, find_source
from xglm_core.weight_names import HEAD, WeightSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SHARD_FILE = "model-{:05d}-of-{:05d}.safetensors"
_ANY_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Checkpoint:
    """An open checkpoint: its configuration, and its tensors by canonical name, mapped into memory.

    Attributes:
        folder: where it lies.
        config: its configuration.
    """

    def __init__(self, folder: Path, config: XGLMConfig, files: Sequence[TensorFile]) -> None:
        self.folder = folder
        self.config = config
        stored = {name: file for file in files for name in file.tensors}
        # A checkpoint of the bare decoder (`XGLMModel`) has the same names without "model.".
        bare = not any(name.startswith("model.") for name in stored)
        self._where = {
            name if not bare or name == HEAD else f"model.{name}": (file, name) for name, file in stored.items()
        }

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of the stored tensors."""
        return frozenset(self._where)

    def info(self, name: str) -> TensorInfo:
        """Stored type and shape of a tensor."""
        file, stored = self._where[name]
        return file.tensors[stored]

    def read(self, name: str, dtype: FloatType | None = None) -> np.ndarray:
        """A tensor in canonical shape: a copy-on-write view of the file where its format and `dtype` allow that.

        The view of a matrix that Flax and Keras store transposed is not contiguous.

        Args:
            name: canonical name.
            dtype: the type to convert to; None keeps the stored one. See `FloatType.storage` for bfloat16.
        """
        file, stored = self._where[name]
        array = file.read(stored)
        return array if dtype is None else convert(array, file.tensors[stored].dtype, dtype)

    def release(self, name: str) -> None:
        """Frees the resident pages of a tensor that was read and copied."""
        file, stored = self._where[name]
        file.release(stored)


def open_checkpoint(
    folder: str | os.PathLike[str], weights: str | None = None, **hub: Unpack[HubOptions]
) -> Checkpoint:
    """Opens a checkpoint; no tensor is read yet, and nothing in its files is run.

    Args:
        folder: holds the weights and, unless they are fairseq's, `config.json`. Or the id of a repository of the
            Hugging Face Hub, of which the configuration and the weights of one format are downloaded.
        weights: the format to read, one of "safetensors", "torch", "flax", "tf", "fairseq"; None takes the first of
            these that is there.
        hub: which revision of a repository, and how it is downloaded; see `HubOptions`.

    Raises:
        CheckpointError: the folder or its weights are missing or damaged, or cannot be downloaded.
        ConfigError: its `config.json` does not describe an XGLM model.
        InputError: `weights` is no format.
        BackendError: the format, or the hub, needs a package that is not installed.
    """
    return open_source(find_source(folder, **hub), weights)


def open_source(source: Source, weights: str | None) -> Checkpoint:
    """`open_checkpoint`, of a source that has been found already."""
    found = find_format(source, weights)
    is_fairseq = found is not None and found.open is FairseqFile
    if found is None or (CONFIG_FILE not in source.names and not is_fairseq):
        others = ", ".join(format.file for format in FORMATS.values() if format.file != WEIGHTS_FILE)
        raise CheckpointError(
            f"{source.place}: no checkpoint here; expected {CONFIG_FILE} and {WEIGHTS_FILE} (or {others}; or shards "
            f"with their index), found {shortened(sorted(source.names))}"
        )
    if is_fairseq:
        file = FairseqFile(source.fetch([found.file]) / found.file)
        return Checkpoint(file.path.parent, file.config, [file])
    folder = source.fetch([CONFIG_FILE], [GENERATION_CONFIG_FILE])
    config = XGLMConfig.from_json_file(folder / CONFIG_FILE)
    fetch_weights(source, found)
    return Checkpoint(folder, config, open_files(folder, found))


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: XGLMConfig,
    specs: Sequence[WeightSpec],
    dtype: FloatType,
    read: Callable[[str], np.ndarray],
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a checkpoint that transformers can load too, one tensor in memory at a time.

    An older checkpoint in the folder stays whole until the new one is complete; then it is replaced, and weight files
    that no longer belong to it are removed.

    Args:
        folder: created if it is missing.
        config: written as `config.json`.
        specs: the weights.
        dtype: the type that `read` gives.
        read: gives a weight by canonical name, in canonical shape and in `dtype.storage`.
        max_shard_size: most bytes in one file, as a number or e.g. "500MB"; a larger single tensor has its own file.

    Raises:
        InputError: `max_shard_size` is no size.
        ConfigError: the configuration cannot be saved.
    """
    shards = list(_split(specs, dtype, parse_size(max_shard_size)))
    names = [WEIGHTS_FILE] if len(shards) == 1 else [_SHARD_FILE.format(i + 1, len(shards)) for i in range(len(shards))]
    texts = {CONFIG_FILE: config.to_json_string()}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(spec, dtype) for spec in specs)},
            "weight_map": {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard},
        }
        texts[INDEX_FILE] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as all_or_nothing:  # All files are complete before the first takes its name.
        for name, text in texts.items():
            all_or_nothing.enter_context(replacing(folder / name)).write(text.encode())
        for name, shard in zip(names, shards, strict=True):
            file = all_or_nothing.enter_context(replacing(folder / name))
            write_safetensors(file, [(spec.name, dtype, spec.shape) for spec in shard], read)
    for entry in folder.iterdir():
        ours = entry.name in (WEIGHTS_FILE, INDEX_FILE) or _ANY_SHARD.fullmatch(entry.name)
        if ours and entry.name not in (*texts, *names):
            entry.unlink()


def parse_size(size: int | str) -> int:
    """A number of bytes from 5000000000, "5GB" or "5GiB".

    Raises:
        InputError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    if not match or (count := int(Decimal(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise InputError(f"max_shard_size is {size!r}, expected a number of bytes or a size such as '500MB' or '5GB'")
    return count


def _split(specs: Sequence[WeightSpec], dtype: FloatType, limit: int) -> Iterator[list[WeightSpec]]:
    """Cuts the weights, in order, into files of at most `limit` bytes."""
    shard: list[WeightSpec] = []
    size = 0
    for spec in specs:
        if shard and size + _bytes(spec, dtype) > limit:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += _bytes(spec, dtype)
    yield shard


def _bytes(spec: WeightSpec, dtype: FloatType) -> int:
    return math.prod(spec.shape) * dtype.storage.itemsize
