"""The formats of checkpoints, and which files of a folder hold the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xglm_core.checkpoint.fairseq import FairseqFile
from xglm_core.checkpoint.file_layout import Writer
from xglm_core.checkpoint.flax_msgpack import FlaxFile
from xglm_core.checkpoint.flax_writer import FLAX_WRITER
from xglm_core.checkpoint.keras_h5 import KerasFile
from xglm_core.checkpoint.keras_writer import KERAS_WRITER
from xglm_core.checkpoint.safetensors import SAFETENSORS_WRITER, SafetensorsFile
from xglm_core.checkpoint.tensor_file import TensorFile, shown
from xglm_core.checkpoint.torch_bin import TorchFile
from xglm_core.checkpoint.torch_writer import TORCH_WRITER
from xglm_core.errors import CheckpointError, InputError
from xglm_core.hub import Source

_MOST_INDEX_BYTES = 6_000_000  # As Python objects, JSON can take 30 times its size.


class Reader(Protocol):
    """Opens a file of a format: a subclass of `TensorFile`."""

    def __call__(self, path: Path) -> TensorFile:
        """Opens it."""

    @staticmethod
    def canonical_name(name: str) -> str:
        """See `TensorFile.canonical_name`."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what users give as `weights`.
        file: the file that holds all weights.
        open: opens a file of the format.
        writer: writes the format; None if it can only be read.
        sharded: whether weights may be in several files, which an index lists.
    """

    name: str
    file: str
    open: Reader
    writer: Writer | None
    sharded: bool = True

    @property
    def index(self) -> str:
        """The file that lists which weight is in which file."""
        return f"{self.file}.index.json"

    def shard_names(self, count: int) -> list[str]:
        """The names of `count` files that together hold the weights."""
        stem, suffix = self.file.rsplit(".", 1)
        return [self.file] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]

    def is_weight_file(self, name: str) -> bool:
        """Whether a file of this name holds weights in this format, or is the index."""
        stem, suffix = map(re.escape, self.file.rsplit(".", 1))
        return name in (self.file, self.index) or bool(re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.{suffix}", name))


# In order of preference: first what needs no interpretation, then what most repositories have.
FORMATS = {
    format.name: format
    for format in (
        Format("safetensors", "model.safetensors", SafetensorsFile, SAFETENSORS_WRITER),
        Format("torch", "pytorch_model.bin", TorchFile, TORCH_WRITER),
        Format("flax", "flax_model.msgpack", FlaxFile, FLAX_WRITER),
        Format("tf", "tf_model.h5", KerasFile, KERAS_WRITER),
        Format("fairseq", "model.pt", FairseqFile, writer=None, sharded=False),
    )
}


def present_formats(names: Collection[str]) -> list[Format]:
    """The formats in which files of these names hold weights."""
    return [format for format in FORMATS.values() if format.file in names or (format.sharded and format.index in names)]


def find_format(source: Source, weights: str | None) -> Format | None:
    """The format to read: the requested one, or the first that exists; None if there are no weights.

    Raises:
        InputError: `weights` is not a format.
        CheckpointError: there are weights, but not in the requested format.
    """
    present = present_formats(source.names)
    if weights is None:
        return present[0] if present else None
    if weights not in FORMATS:
        raise InputError(f"weights is {weights!r}, expected one of {', '.join(FORMATS)}, or None to choose")
    if present and FORMATS[weights] not in present:
        raise CheckpointError(
            f"{source.place}: no {FORMATS[weights].file} here, found weights in the formats "
            f"{', '.join(format.name for format in present)}; give one of these as `weights`"
        )
    return FORMATS[weights] if present else None


def fetch_weights(source: Source, format: Format) -> None:
    """Fetches the file of a format, or its index and the files that it lists.

    Raises:
        CheckpointError: the index is damaged, or a file cannot be fetched.
    """
    if format.file in source.names:
        source.fetch([format.file])
        return
    weight_map = read_index(source.fetch([format.index]) / format.index)
    if shards := sorted({*weight_map.values()}):
        source.fetch(shards)


def open_files(folder: Path, format: Format) -> list[TensorFile]:
    """Opens the file of a format, or all files that the index lists.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not fit the files.
    """
    if (folder / format.file).is_file():
        return [format.open(folder / format.file)]
    path = folder / format.index
    weight_map = read_index(path)
    shards = sorted({*weight_map.values()})
    for name in shards:
        if not (folder / name).is_file():
            raise _not_in_folder(path, name)
    files = [format.open(folder / name) for name in shards]
    stored = [(name, file.path.name) for file in files for name in (*file.tensors, *file.others)]
    listed = [(format.open.canonical_name(name), file) for name, file in weight_map.items()]
    different = sorted({*stored} ^ {*listed})
    if different or len({name for name, _ in stored}) < len(stored):
        names = [f"{_quoted(name)} in {_quoted(file)}" for name, file in different] or ["a name that is in two files"]
        raise CheckpointError(f"{path}: index and files disagree on {shortened(names)}")
    return files


def shortened(items: Sequence[str], most: int = 8) -> str:
    """The first items of a list, as text."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "nothing") + rest


def _quoted(value: Any) -> str:
    """A value of an index, which may be any JSON value, for a message."""
    return shown(value) if isinstance(value, str) else repr(value)[:100]


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor by an index. Names of files are plain: they cannot lead out of the folder.

    Raises:
        CheckpointError: the index is damaged.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_INDEX_BYTES + 1)
        if len(text) > _MOST_INDEX_BYTES:
            raise CheckpointError(f"{path}: has more than {_MOST_INDEX_BYTES} bytes")
        weight_map: dict[str, Any] = json.loads(text.decode(), object_pairs_hook=_unique)["weight_map"]
        shards = sorted({*weight_map.values()})  # Raises for anything but names; or numbers, which are not files.
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: expected a JSON object with a 'weight_map' of tensor to file names") from None
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise _not_in_folder(path, name)
    return weight_map


def _not_in_folder(index: Path, name: Any) -> CheckpointError:
    return CheckpointError(
        f"{index}: names the file {_quoted(name)}, which is not in the folder; is a download incomplete?"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)
