"""Writes a checkpoint folder in any format: completely or not at all, in little memory, and verified."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xglm_core.checkpoint.dtypes import FloatType
from xglm_core.checkpoint.file_layout import Writer
from xglm_core.checkpoint.formats import FORMATS, Format
from xglm_core.checkpoint.int8 import stored_types, with_method
from xglm_core.checkpoint.tensor_file import Buffers, is_large, row_blocks
from xglm_core.checkpoint.tensor_writing import Advance, equal_values, in_threads, write_values
from xglm_core.config import CONFIG_FILE, XGLMConfig
from xglm_core.errors import CheckpointError, InputError
from xglm_core.files import remove_leftovers, replacing
from xglm_core.weight_names import WeightSpec

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class NewWeight:
    """A weight to write, and its type in the file."""

    spec: WeightSpec
    dtype: FloatType

    @property
    def nbytes(self) -> int:
        """The number of bytes of its values."""
        return math.prod(self.spec.shape) * self.dtype.storage.itemsize


# Yields a weight in blocks of rows, see `row_blocks`; the arguments are its canonical name and whether to transpose
# blocks. A block is valid until the same thread asks for another one, of any weight.
Blocks = Callable[[str, bool], Iterator[np.ndarray]]


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: XGLMConfig,
    specs: Sequence[WeightSpec],
    dtype: FloatType,
    read: Callable[[str], np.ndarray],
    max_shard_size: int | str = "5GB",
    *,
    int8: bool = False,
) -> None:
    """Writes a checkpoint as safetensors, which transformers can load, too; two tensors are in memory at a time.

    An older checkpoint in the folder stays complete until the new one is. Then it is replaced, and weight files that no
    longer belong to it are removed.

    Args:
        folder: created if it is missing.
        config: written as `config.json`.
        specs: the weights.
        dtype: the type of the weights.
        read: returns a weight by canonical name, in canonical shape and `dtype.storage`. Two threads call it, and twice
            for each weight.
        max_shard_size: the largest size of a file, in bytes or as in "500MB"; a larger tensor has a file of its own.
        int8: whether matrices are int8; `read` returns their scales, too. See `xglm_core.checkpoint.int8`.

    Raises:
        InputError: `max_shard_size` is not a size.
        ConfigError: the configuration cannot be saved.
        CheckpointError: the files cannot be written.
    """
    buffers = Buffers()
    write_checkpoint(
        Path(folder),
        FORMATS["safetensors"],
        [NewWeight(*weight) for weight in stored_types(specs, [dtype for _ in specs], int8=int8)],
        lambda name, transposed: row_blocks(read(name), buffers, transposed=transposed),
        {CONFIG_FILE: with_method(config, int8=int8).to_json_string().encode()},
        parse_size(max_shard_size),
    )


def write_checkpoint(
    folder: Path,
    format: Format,
    weights: Sequence[NewWeight],
    blocks: Blocks,
    others: Mapping[str, bytes],
    max_shard_bytes: int,
    advance: Advance = lambda written, verified: None,
) -> None:
    """Writes weights in a format, with an index if there are several files, and other files beside them.

    Before the first file takes its final name, all are complete, and their weights were read back and compared. The
    file by which the weights are found - the only one, or the index - is renamed last.

    Args:
        folder: created if it is missing.
        format: a format with a writer.
        weights: the weights.
        blocks: yields their values. Two threads call it, and twice for each weight.
        others: the contents of other files by name, including `config.json`.
        max_shard_bytes: the largest number of bytes of weights in one file.
        advance: is called with the progress, by one thread at a time.

    Raises:
        CheckpointError: a file cannot be written, or does not read back the same.
    """
    assert format.writer is not None
    lock = threading.Lock()

    def advance_alone(written: int, verified: int) -> None:
        with lock:
            advance(written, verified)

    shards = list(_split(weights, max_shard_bytes))
    names = format.shard_names(len(shards))
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in weights)},
        "weight_map": {
            format.writer.stored_name(weight.spec): name
            for name, shard in zip(names, shards, strict=True)
            for weight in shard
        },
    }
    texts = dict(others)
    if len(shards) > 1:
        texts[format.index] = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        # The file that is opened first is renamed last.
        order = sorted([*texts, *names], key=lambda name: name not in (format.index, format.file))
        with contextlib.ExitStack() as all_or_nothing:
            files = {name: all_or_nothing.enter_context(replacing(folder / name)) for name in order}
            for name, text in texts.items():
                files[name].write(text)
            for name, shard in zip(names, shards, strict=True):
                _write_weights(files[name], folder / name, format, shard, blocks, len(shards) > 1, advance_alone)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written: {error.strerror or error}; what the folder held before is unchanged"
        ) from None
    for entry in folder.iterdir():
        if format.is_weight_file(entry.name) and entry.name not in (*names, *texts):
            entry.unlink()


def parse_size(size: int | str) -> int:
    """The number of bytes for 5000000000, "5GB" or "5GiB".

    Raises:
        InputError: the size has another form, or is not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    if not match or (count := int(Decimal(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise InputError(f"max_shard_size is {size!r}, expected a number of bytes or a size such as '500MB' or '5GB'")
    return count


def _write_weights(
    file: BinaryIO,
    path: Path,
    format: Format,
    weights: Sequence[NewWeight],
    blocks: Blocks,
    sharded: bool,
    advance: Advance,
) -> None:
    """Writes one file and verifies it."""
    assert format.writer is not None
    writer: Writer = format.writer
    entries = [writer.entry(weight.spec, weight.dtype) for weight in weights]
    layout = writer.lay_out(file, entries, sharded)

    def stored_blocks(index: int) -> Iterator[np.ndarray]:
        spec = weights[index].spec
        return blocks(spec.name, writer.is_transposed(spec))

    write_values(file, entries, layout, stored_blocks, advance)
    _verify(file, path, format, weights, blocks, advance)


def _verify(
    file: BinaryIO, path: Path, format: Format, weights: Sequence[NewWeight], blocks: Blocks, advance: Advance
) -> None:
    """Opens a written file as any reader would, and compares it with its source."""
    assert format.writer is not None
    writer = format.writer
    written = format.open(Path(file.name))
    found = {name: (info.dtype, info.shape) for name, info in (*written.tensors.items(), *written.others.items())}
    if found != {weight.spec.name: (weight.dtype, weight.spec.shape) for weight in weights}:
        raise CheckpointError(f"{path}: was written with other names, types or shapes than it should have")
    buffers = Buffers()

    def compare(weight: NewWeight) -> None:
        name = weight.spec.name
        # If both files store the transpose, it could be compared as it is; but that is slow for large matrices.
        transposed = writer.is_transposed(weight.spec) and not is_large(weight.spec.shape)
        if not equal_values(blocks(name, transposed), written.blocks(name, buffers, transposed=transposed)):
            raise CheckpointError(
                f"{path}: {name} was written with other numbers than it should have; is the disk or the memory faulty?"
            )
        advance(0, weight.nbytes)

    in_threads(compare, weights, file)


def _split(weights: Sequence[NewWeight], limit: int) -> Iterator[list[NewWeight]]:
    """Distributes the weights, in order, to files of at most `limit` bytes."""
    shard: list[NewWeight] = []
    size = 0
    for weight in weights:
        if shard and size + weight.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += weight.nbytes
    yield shard
