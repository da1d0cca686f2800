"""Checkpoint folders: `config.json` beside weights in any of the published formats."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from xglm_core.checkpoint.dtypes import FloatType, convert, overflows
from xglm_core.checkpoint.fairseq import FairseqFile
from xglm_core.checkpoint.formats import FORMATS, find_format, open_files, shortened
from xglm_core.checkpoint.mapped import TensorFile, TensorInfo, row_blocks
from xglm_core.config import CONFIG_FILE, XGLMConfig
from xglm_core.errors import CheckpointError
from xglm_core.weight_names import HEAD

WEIGHTS_FILE = "model.safetensors"


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

    def blocks(self, name: str, dtype: FloatType, *, transposed: bool = False) -> Iterator[np.ndarray]:
        """A tensor in blocks of rows, see `row_blocks`; the pages of the file are freed when the next one is asked for.

        Args:
            name: canonical name.
            dtype: the type to convert to.
            transposed: whether each block is transposed.

        Raises:
            CheckpointError: a number is finite, but beyond the range of `dtype`.
        """
        stored = self.info(name).dtype
        for block in row_blocks(self.read(name), transposed=transposed):
            converted = convert(block, stored, dtype)
            if overflows(block, stored, converted, dtype):
                raise CheckpointError(
                    f"{self.folder}: {name} has numbers beyond the range of {dtype.name}, which would become infinite; "
                    "choose a type with a larger range"
                )
            yield converted
            self.release(name)

    def release(self, name: str) -> None:
        """Frees the resident pages of a tensor that was read and copied."""
        file, stored = self._where[name]
        file.release(stored)


def open_checkpoint(folder: str | os.PathLike[str], weights: str | None = None) -> Checkpoint:
    """Opens a checkpoint folder; no tensor is read yet, and nothing in it is run.

    Args:
        folder: holds the weights and, unless they are fairseq's, `config.json`.
        weights: the format to read, one of "safetensors", "torch", "flax", "tf", "fairseq"; None takes the first of
            these that is there.

    Raises:
        CheckpointError: the folder or its weights are missing or damaged.
        ConfigError: its `config.json` does not describe an XGLM model.
        InputError: `weights` is no format.
        BackendError: the format needs a package that is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; expected a checkpoint folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    found = find_format(folder, weights)
    if found is not None and found.open is FairseqFile:
        file = FairseqFile(folder / found.file)
        return Checkpoint(folder, file.config, [file])
    if found is None or not (folder / CONFIG_FILE).is_file():
        present = sorted(entry.name for entry in folder.iterdir())
        others = ", ".join(format.file for format in FORMATS.values() if format.file != WEIGHTS_FILE)
        raise CheckpointError(
            f"{folder}: no checkpoint here; expected {CONFIG_FILE} and {WEIGHTS_FILE} (or {others}; or shards with "
            f"their index), found {shortened(present)}"
        )
    config = XGLMConfig.from_pretrained(folder)
    return Checkpoint(folder, config, open_files(folder, found))
