"""Converts a checkpoint of any format to one that can be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from xglm_core.checkpoint.dtypes import DTYPES, FLOAT8, INT8, FloatType, float_type
from xglm_core.checkpoint.folder import Checkpoint, open_source
from xglm_core.checkpoint.formats import FORMATS, Format, present_formats, shortened
from xglm_core.checkpoint.int8 import is_int8, stored_types, with_method
from xglm_core.checkpoint.loading import plan_loading
from xglm_core.checkpoint.tensor_file import Buffers
from xglm_core.checkpoint.tensor_writing import Advance
from xglm_core.checkpoint.writing import NewWeight, parse_size, write_checkpoint
from xglm_core.config import CONFIG_FILE, GENERATION_CONFIG_FILE, XGLMConfig
from xglm_core.errors import CheckpointError, InputError
from xglm_core.hub import HubOptions, find_source
from xglm_core.weight_names import EMBEDDING, HEAD, weight_specs

WRITABLE = tuple(name for name, format in FORMATS.items() if format.writer is not None)

# The files of a checkpoint beside weights and `config.json`; they are the same for all formats.
_COPIED = (
    GENERATION_CONFIG_FILE,
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# The keys of `config.json` that name the type of the weights; transformers loads weights in that type.
_TYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(frozen=True)
class Conversion:
    """A conversion that was checked, but not yet written.

    Attributes:
        source: the checkpoint to read.
        destination: the folder to write.
        format: the format to write.
        config: the configuration to write.
        weights: the weights to write, with their types.
        max_shard_bytes: the largest number of bytes in one file.
    """

    source: Checkpoint
    destination: Path
    format: Format
    config: XGLMConfig
    weights: tuple[NewWeight, ...]
    max_shard_bytes: int

    @property
    def changed_types(self) -> set[str]:
        """The types to which weights are converted."""
        names = {weight: _source_name(weight.spec.name, self.config) for weight in self.weights}
        return {
            weight.dtype.name
            for weight, name in names.items()
            if name in self.source.names and weight.dtype is not self.source.info(name).dtype
        }

    @property
    def nbytes(self) -> int:
        """The number of bytes of all weights."""
        return sum(weight.nbytes for weight in self.weights)

    def run(self, advance: Advance = lambda written, verified: None) -> None:
        """Writes the checkpoint; see `convert_checkpoint`."""
        buffers = Buffers()
        dtypes = {weight.spec.name: weight.dtype for weight in self.weights}

        def blocks(name: str, transposed: bool) -> Iterator[np.ndarray]:
            return self.source.blocks(_source_name(name, self.config), dtypes[name], buffers, transposed=transposed)

        others = {}
        within_source = _same_folder(self.source.folder, self.destination)
        if not within_source:
            paths = [self.source.folder / name for name in _COPIED]
            others = {path.name: path.read_bytes() for path in paths if path.is_file()}
        if not (within_source and (self.destination / CONFIG_FILE).is_file()):
            others[CONFIG_FILE] = self.config.to_json_string().encode()
        write_checkpoint(self.destination, self.format, self.weights, blocks, others, self.max_shard_bytes, advance)


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str,
    weights: str | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    **hub: Unpack[HubOptions],
) -> None:
    """Writes a checkpoint in another format or type, in blocks of a few megabytes, reads it back and compares.

    The destination receives the weights, `config.json`, and those of `generation_config.json` and the tokenizer files
    that the source has. Nothing in it changes until all of them are complete.

    Args:
        source: a checkpoint folder, or the id of a repository of the Hugging Face Hub.
        destination: the folder to write. It has no weights yet, or is the source itself, which then has both formats.
        to: the format to write, one of "safetensors", "torch", "flax", "tf".
        weights: the format to read; see `open_checkpoint`.
        dtype: the type to store, as a name or a framework's type; None keeps the type of each weight. "int8" is for
            safetensors alone: matrices become int8, and other weights keep their type.
        max_shard_size: the largest size of a file, in bytes or as in "500MB"; a larger tensor has a file of its own.
        hub: see `HubOptions`.

    Raises:
        InputError: an argument is invalid, or the format does not have the type.
        CheckpointError: the source is damaged or does not fit its configuration; the destination holds weights or
            cannot be written; a value is too large for `dtype`; or the written files do not read back the same.
        BackendError: a format needs a package that is not installed.
    """
    plan_conversion(
        source, destination, to=to, weights=weights, dtype=dtype, max_shard_size=max_shard_size, **hub
    ).run()


def plan_conversion(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str,
    weights: str | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    **hub: Unpack[HubOptions],
) -> Conversion:
    """Checks everything that can be checked before writing; see `convert_checkpoint` for arguments and errors."""
    if to not in WRITABLE:
        raise InputError(f"to is {to!r}, expected one of {', '.join(WRITABLE)}")
    format, limit = FORMATS[to], parse_size(max_shard_size)
    target = None if dtype is None else float_type(dtype, {**DTYPES, INT8.name: INT8})
    destination = Path(destination)
    files = find_source(source, **hub)
    checkpoint = open_source(files, weights)
    if others := [name for name in _COPIED if name in files.names]:
        files.fetch(others)
    _check_destination(checkpoint.folder, destination, format)
    # A bare decoder stays one. Without a head, the file does not say whether the model is tied.
    config = plan_loading(checkpoint, with_head=HEAD in checkpoint.names).config
    int8 = checkpoint.is_int8 if target is None else target is INT8
    if int8 != is_int8(config) and _same_folder(checkpoint.folder, destination):
        raise InputError(f"{destination}: {CONFIG_FILE} says whether weights are int8, so both kinds cannot be here")
    config = with_method(config, int8=int8)
    target = None if target is INT8 else target  # Vectors keep their type.
    for key in _TYPE_KEYS:
        if target is not None and key in config:
            setattr(config, key, target.name)
    assert format.writer is not None
    tied = config.tie_word_embeddings
    has_head = format.writer.untied_head if tied else HEAD in checkpoint.names
    specs = weight_specs(config, with_head=has_head)
    types = [target or checkpoint.info(_source_name(spec.name, config)).dtype for spec in specs]
    new = tuple(NewWeight(*weight) for weight in stored_types(specs, types, int8=int8))
    _check_types(checkpoint.folder, {weight.dtype for weight in new}, format)
    return Conversion(checkpoint, destination, format, config, new, limit)


def _source_name(name: str, config: XGLMConfig) -> str:
    """The source's weight for a name: a tied head is the embedding."""
    return EMBEDDING if name == HEAD and config.tie_word_embeddings else name


def _check_destination(source: Path, destination: Path, format: Format) -> None:
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file, expected a folder to write {format.file} into")
    if not destination.is_dir():
        return
    within_source = _same_folder(source, destination)
    for other in present_formats({entry.name for entry in destination.iterdir()}):
        if other is format or not within_source:
            raise CheckpointError(
                f"{destination}: already holds weights in the format {other.name}; choose another folder or remove them"
            )


def _check_types(folder: Path, dtypes: set[FloatType], format: Format) -> None:
    assert format.writer is not None
    if dtypes & {*FLOAT8}:
        raise InputError(
            f"{folder}: the weights are of 8 bits, which can only be read; give the dtype to convert them to"
        )
    unknown = sorted(dtype.name for dtype in dtypes - {*format.writer.types})
    if unknown:
        raise InputError(
            f"{format.file} cannot hold {shortened(unknown)}, only {', '.join(t.name for t in format.writer.types)}; "
            "give one of these as dtype"
        )


def _same_folder(source: Path, destination: Path) -> bool:
    return destination.exists() and os.path.samefile(source, destination)
