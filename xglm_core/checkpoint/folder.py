"""Checkpoint folders: `config.json` beside weights in any of the published formats."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from xglm_core.checkpoint.dtypes import FloatType, convert, overflows
from xglm_core.checkpoint.fairseq import FairseqFile
from xglm_core.checkpoint.formats import FORMATS, fetch_weights, find_format, open_files, shortened
from xglm_core.checkpoint.tensor_file import Buffers, TensorFile, TensorInfo
from xglm_core.config import CONFIG_FILE, GENERATION_CONFIG_FILE, XGLMConfig
from xglm_core.errors import CheckpointError
from xglm_core.hub import HubOptions, Source, find_source
from xglm_core.weight_names import HEAD, is_ignored_integer, stored_prefix

WEIGHTS_FILE = "model.safetensors"


class Checkpoint:
    """An open checkpoint: its configuration, and its tensors by canonical name, mapped into memory.

    Attributes:
        folder: the folder.
        config: the configuration.
        format: the format of the weights, as in `open_checkpoint`.
        others: the types, by name, of tensors that are not weights; those without a meaning are left out.
    """

    def __init__(self, folder: Path, config: XGLMConfig, format: str, files: Sequence[TensorFile]) -> None:
        self.folder = folder
        self.config = config
        self.format = format
        prefix = stored_prefix([name for file in files for name in (*file.tensors, *file.others)])
        stored = {name.removeprefix(prefix): (file, name) for file in files for name in file.tensors}
        self.others = {
            name: info.dtype.name
            for file in files
            for name, info in file.others.items()
            if not is_ignored_integer(name)
        }
        # A checkpoint of the bare decoder (`XGLMModel`) has the same names without "model.".
        bare = not any("model." in name for name in stored)
        self._where = {name if not bare or name == HEAD else f"model.{name}": at for name, at in stored.items()}

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of the stored tensors."""
        return frozenset(self._where)

    def info(self, name: str) -> TensorInfo:
        """The stored type and shape of a tensor."""
        file, stored = self._where[name]
        return file.tensors[stored]

    def read(self, name: str, dtype: FloatType | None = None) -> np.ndarray:
        """A tensor in canonical shape: a copy-on-write view of the file if its format and `dtype` allow one.

        Flax and Keras store matrices transposed, so their views are not contiguous.

        Args:
            name: canonical name.
            dtype: the type to convert to; None keeps the stored one. See `FloatType.storage` for bfloat16.
        """
        file, stored = self._where[name]
        array = file.read(stored)
        return array if dtype is None else convert(array, file.tensors[stored].dtype, dtype)

    def blocks(
        self, name: str, dtype: FloatType, buffers: Buffers, *, transposed: bool = False
    ) -> Iterator[np.ndarray]:
        """Yields a tensor in blocks of rows, see `row_blocks`; the next block frees the file's pages of the last one.

        Args:
            name: canonical name.
            dtype: the type to convert to.
            buffers: see `row_blocks`.
            transposed: whether each block is transposed.

        Raises:
            CheckpointError: a finite value is beyond the range of `dtype`.
        """
        file, stored_name = self._where[name]
        stored = file.tensors[stored_name].dtype
        for block in file.blocks(stored_name, buffers, transposed=transposed):
            converted = convert(block, stored, dtype)
            if overflows(block, stored, converted, dtype):
                raise CheckpointError(
                    f"{self.folder}: {name} has numbers beyond the range of {dtype.name}, which would become infinite; "
                    "choose a type with a larger range"
                )
            yield converted

    def release(self, name: str) -> None:
        """Frees the pages of a tensor that was read and copied."""
        file, stored = self._where[name]
        file.release(stored)


def open_checkpoint(
    folder: str | os.PathLike[str], weights: str | None = None, **hub: Unpack[HubOptions]
) -> Checkpoint:
    """Opens a checkpoint. No tensor is read yet, and no code in the files is ever run.

    Args:
        folder: a folder with the weights and, unless they are fairseq's, `config.json`. Or the id of a repository of
            the Hugging Face Hub; its configuration and its weights in one format are downloaded.
        weights: the format to read, one of "safetensors", "torch", "flax", "tf", "fairseq"; None takes the first of
            these that exists.
        hub: the revision of a repository, and how it is downloaded; see `HubOptions`.

    Raises:
        CheckpointError: the folder or its weights are missing or damaged, or cannot be downloaded.
        ConfigError: its `config.json` does not describe an XGLM model.
        InputError: `weights` is not a format.
        BackendError: the format, or the hub, needs a package that is not installed.
    """
    return open_source(find_source(folder, **hub), weights)


def open_source(source: Source, weights: str | None) -> Checkpoint:
    """`open_checkpoint` for a source that was already found."""
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
        return Checkpoint(file.path.parent, file.config, found.name, [file])
    folder = source.fetch([CONFIG_FILE], [GENERATION_CONFIG_FILE])
    config = XGLMConfig.from_json_file(folder / CONFIG_FILE)
    fetch_weights(source, found)
    return Checkpoint(folder, config, found.name, open_files(folder, found))
