"""Converting a checkpoint from any format into those that can be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from xglm_core.checkpoint.dtypes import FLOAT8, FloatType, float_type
from xglm_core.checkpoint.filling import Advance
from xglm_core.checkpoint.folder import Checkpoint, open_source
from xglm_core.checkpoint.formats import FORMATS, Format, present_formats, shortened
from xglm_core.checkpoint.loading import plan_loading
from xglm_core.checkpoint.mapped import Buffers
from xglm_core.checkpoint.writing import NewWeight, parse_size, write_checkpoint
from xglm_core.config import CONFIG_FILE, GENERATION_CONFIG_FILE, XGLMConfig
from xglm_core.errors import CheckpointError, InputError
from xglm_core.hub import HubOptions, find_source
from xglm_core.weight_names import EMBEDDING, HEAD, weight_specs

WRITABLE = tuple(name for name, format in FORMATS.items() if format.writer is not None)

# What belongs to a checkpoint beside its weights and `config.json`, and is the same for all formats.
_COPIED = (
    GENERATION_CONFIG_FILE,
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Where `config.json` names the type of the weights, transformers loads them as that.
_TYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(frozen=True)
class Conversion:
    """A conversion whose input was checked, and of which nothing has been written.

    Attributes:
        source: where the weights come from.
        destination: the folder to write.
        format: the format to write.
        config: as `config.json` will have it.
        weights: what will be stored, each with its type.
        max_shard_bytes: most bytes in one file.
    """

    source: Checkpoint
    destination: Path
    format: Format
    config: XGLMConfig
    weights: tuple[NewWeight, ...]
    max_shard_bytes: int

    @property
    def changed_types(self) -> set[str]:
        """The types that weights are converted to."""
        return {
            weight.dtype.name
            for weight in self.weights
            if weight.dtype is not self.source.info(_source_name(weight.spec.name, self.config)).dtype
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all weights to be written."""
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
    """Writes a checkpoint in another format or type, in blocks of a few megabytes, and reads it back to compare.

    The destination gets the weights, `config.json`, and what the source has of `generation_config.json` and tokenizer
    files. Nothing in it changes until all of these are complete.

    Args:
        source: a checkpoint folder, or the id of a repository of the Hugging Face Hub.
        destination: the folder to write: one without weights, or the source itself, which then has both formats.
        to: the format to write, one of "safetensors", "torch", "flax", "tf".
        weights: the format to read; see `open_checkpoint`.
        dtype: name or framework type to store all weights in; None keeps each weight's.
        max_shard_size: most bytes in one file, as a number or e.g. "500MB"; a larger single tensor has its own file.
        hub: see `HubOptions`.

    Raises:
        InputError: an argument is none of these, or the format has no such type.
        CheckpointError: the source is damaged or does not fit its configuration, the destination holds weights or
            cannot be written, a number is too large for `dtype`, or what was written does not read back the same.
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
    """Checks all that can be checked before writing; arguments and errors are those of `convert_checkpoint`."""
    if to not in WRITABLE:
        raise InputError(f"to is {to!r}, expected one of {', '.join(WRITABLE)}")
    format, limit = FORMATS[to], parse_size(max_shard_size)
    target = None if dtype is None else float_type(dtype)
    destination = Path(destination)
    files = find_source(source, **hub)
    checkpoint = open_source(files, weights)
    if others := [name for name in _COPIED if name in files.names]:
        files.fetch(others)
    _check_destination(checkpoint.folder, destination, format)
    # A bare decoder stays one: without a head it says nothing about tying.
    config = plan_loading(checkpoint, with_head=HEAD in checkpoint.names).config
    for key in _TYPE_KEYS:
        if target is not None and key in config:
            setattr(config, key, target.name)
    assert format.writer is not None
    tied = config.tie_word_embeddings
    has_head = format.writer.untied_head if tied else HEAD in checkpoint.names
    new = tuple(
        NewWeight(spec, target or checkpoint.info(_source_name(spec.name, config)).dtype)
        for spec in weight_specs(config, with_head=has_head)
    )
    _check_types(checkpoint.folder, {weight.dtype for weight in new}, format)
    return Conversion(checkpoint, destination, format, config, new, limit)


def _source_name(name: str, config: XGLMConfig) -> str:
    """Which weight of the source becomes this one: a tied head is the embedding."""
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
