"""What the writers of all formats share: a file is first laid out without its values, which are written afterwards.

This mirrors reading: a reader says where the values of each tensor lie, a writer where they will lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from xglm_core.checkpoint.dtypes import STORED, FloatType
from xglm_core.weight_names import WeightSpec


@dataclass(frozen=True)
class Entry:
    """A tensor as a format stores it.

    Attributes:
        name: the format's name for it.
        dtype: the type.
        shape: the stored shape; matrices may be transposed.
    """

    name: str
    dtype: FloatType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes of the values."""
        return math.prod(self.shape) * self.dtype.storage.itemsize


Piece = tuple[int, int]  # Offset in the file, and number of bytes.


@dataclass(frozen=True)
class Layout:
    """A file without its values.

    Attributes:
        places: for each entry, the pieces of the file for its values, in row-major order.
        finish: is called after the values were written, with the CRC-32 of each entry; None for most formats, which
            have no checksums.
    """

    places: Sequence[Sequence[Piece]]
    finish: Callable[[Sequence[int]], None] | None = None


@dataclass(frozen=True)
class Writer:
    """Writes files of a format.

    Attributes:
        lay_out: writes a file without its values; the last argument says whether it is one of several shards.
        stored_name: the name of a weight in an index file.
        transposes: whether matrices of dense layers are stored [in, out].
        untied_head: whether the format stores the head even if it is tied to the embedding.
        types: the types that the format can hold.
    """

    lay_out: Callable[[BinaryIO, Sequence[Entry], bool], Layout]
    stored_name: Callable[[WeightSpec], str]
    transposes: bool = False
    untied_head: bool = False
    types: Sequence[FloatType] = tuple(STORED.values())

    def entry(self, spec: WeightSpec, dtype: FloatType) -> Entry:
        """A weight as the format stores it."""
        shape = spec.shape[::-1] if self.is_transposed(spec) else spec.shape
        return Entry(self.stored_name(spec), dtype, shape)

    def is_transposed(self, spec: WeightSpec) -> bool:
        """Whether the format stores the transpose of a weight."""
        return self.transposes and spec.transposed
