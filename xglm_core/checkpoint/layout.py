"""What the writers of all formats share: a file is first laid out without its numbers, then these are filled in.

It mirrors reading: there, a format says where each tensor's numbers lie; here, where they are to go.
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
        name: what the format calls it.
        dtype: its type.
        shape: in the order of the format, in which matrices may be transposed.
    """

    name: str
    dtype: FloatType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.storage.itemsize


Piece = tuple[int, int]  # Offset in the file, and bytes.


@dataclass(frozen=True)
class Layout:
    """A file without its numbers.

    Attributes:
        places: for each entry, the pieces of the file that hold its numbers, in row-major order.
        finish: is called when the numbers are in, with the CRC-32 of each entry's; None for the formats, most of them,
            that have no such thing.
    """

    places: Sequence[Sequence[Piece]]
    finish: Callable[[Sequence[int]], None] | None = None


@dataclass(frozen=True)
class Writer:
    """How to write files of a format.

    Attributes:
        lay_out: writes a file without its numbers; the last argument says whether it is one of several shards.
        stored_name: what an index file calls a weight.
        transposes: whether matrices of dense layers are stored [in, out].
        untied_head: whether the format has a head of its own even where that is tied to the embedding.
        types: the types of numbers that the format can hold.
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
