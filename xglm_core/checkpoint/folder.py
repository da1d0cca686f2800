"""Checkpoint folders: `config.json` beside weights in any of the published formats."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from xglm_core.checkpoint.dtypes import FLOAT32, INT8, FloatType, convert, overflows
from xglm_core.checkpoint.fairseq import FairseqFile
from xglm_core.checkpoint.formats import FORMATS, fetch_weights, find_format, open_files, shortened
from xglm_core.checkpoint.int8 import SCALE, converted_by_rows, is_int8, row_scales
from xglm_core.checkpoint.tensor_file import Buffers, TensorFile, TensorInfo, row_blocks
from xglm_core.config import CONFIG_FILE, GENERATION_CONFIG_FILE, XGLMConfig
from xglm_core.errors import CheckpointError
from xglm_core.hub import HubOptions, Source, find_source
from xglm_core.weight_names import HEAD, is_ignored_integer, stored_prefix

WEIGHTS_FILE = "model.safetensors"


class Checkpoint:
    """An open checkpoint: its configuration, and its tensors by canonical name, mapped into memory.

    A matrix of int8 and its scales are one tensor, see `xglm_core.checkpoint.int8`.

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
        at_scale: dict[str, tuple[TensorFile, str] | None] = {}
        for file in files:
            for full_name, info in file.others.items():
                name = full_name.removeprefix(prefix)
                is_matrix = info.dtype is INT8 and len(info.shape) == 2 and name.endswith(".weight")
                if is_matrix and (is_int8(config) or name + SCALE in stored):
                    at_scale[name] = stored.pop(name + SCALE, None)
                    stored[name] = file, full_name
                    del self.others[full_name]
        # A checkpoint of the bare decoder (`XGLMModel`) has the same names without "model.".
        bare = not any("model." in name for name in stored)

        def canonical(name: str) -> str:
            return name if not bare or name == HEAD else f"model.{name}"

        self._where = {canonical(name): at for name, at in stored.items()}
        self._at_scale = {canonical(name): at for name, at in at_scale.items()}
        self._scales: dict[str, np.ndarray] = {}

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of the stored tensors."""
        return frozenset(self._where)

    @property
    def is_int8(self) -> bool:
        """Whether any matrix is int8."""
        return bool(self._at_scale)

    def info(self, name: str) -> TensorInfo:
        """The stored type and shape of a tensor."""
        file, stored = self._where[name]
        return file.info(stored)

    @property
    def scale_infos(self) -> dict[str, TensorInfo | None]:
        """The same of the stored scales, by the names of the matrices of int8; None where they are missing."""
        return {name: at and at[0].info(at[1]) for name, at in self._at_scale.items()}

    def scales(self, name: str) -> np.ndarray:
        """The scales of the rows of a matrix as int8, float32 [out, 1]: the stored ones, or those to store it by.

        Raises:
            CheckpointError: they are missing, or not finite, as the file, or the matrix, has such numbers.
        """
        if name not in self._scales:
            where = name
            if name not in self._at_scale:
                found = np.concatenate([row_scales(block) for block in self.blocks(name, FLOAT32, Buffers())])
            elif at := self._at_scale[name]:
                found, where = at[0].read(at[1]).copy(), name + SCALE
            else:
                raise CheckpointError(f"{self.folder}: {name} is int8, but there is no {name + SCALE}")
            if not np.isfinite(found).all():
                raise CheckpointError(f"{self.folder}: {where} has numbers that are not finite, so it cannot be int8")
            self._scales[name] = found
        return self._scales[name]

    def read(self, name: str, dtype: FloatType | None = None) -> np.ndarray:
        """A tensor in canonical shape: a copy-on-write view of the file if its format and `dtype` allow one.

        Flax and Keras store matrices transposed, so their views are not contiguous.

        Args:
            name: canonical name.
            dtype: the type to convert to; None keeps the stored one. See `FloatType.storage` for bfloat16.
        """
        file, stored = self._where[name]
        info, array = file.info(stored), file.read(stored)
        if dtype is None or dtype is info.dtype:
            return array
        if INT8 not in (dtype, info.dtype):
            return convert(array, info.dtype, dtype)
        result, end = np.empty(info.shape, dtype.storage), 0
        for block in self.blocks(name, dtype, Buffers()):
            begin, end = end, end + len(block)
            result[begin:end] = block
        return result

    def blocks(
        self, name: str, dtype: FloatType, buffers: Buffers, *, transposed: bool = False
    ) -> Iterator[np.ndarray]:
        """Yields a tensor in blocks of rows, see `row_blocks`; the next block frees the file's pages of the last one.

        Args:
            name: canonical name, or that of the scales of a matrix as int8.
            dtype: the type to convert to.
            buffers: see `row_blocks`.
            transposed: whether each block is transposed.

        Raises:
            CheckpointError: a finite value is beyond the range of `dtype`.
        """
        if name not in self._where:
            yield from row_blocks(self.scales(name.removesuffix(SCALE)), buffers, transposed=False)
            return
        file, stored_name = self._where[name]
        stored = file.info(stored_name).dtype
        scales = self.scales(name) if stored is not dtype and INT8 in (stored, dtype) else None
        end = 0
        for block in file.blocks(stored_name, buffers, transposed=transposed):
            of_block = None
            if scales is not None:
                begin = end % len(scales)  # Each block of a small matrix that is transposed has a part of all rows.
                end = begin + block.shape[1 if transposed else 0]
                of_block = scales[begin:end].T if transposed else scales[begin:end]
            converted = converted_by_rows(block, stored, dtype, of_block)
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
