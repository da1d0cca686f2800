"""Splits sequences into windows that a model can read, and windows into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A part of a sequence that the model reads at once.

    Attributes:
        sequence: the index of the sequence.
        begin, end: the positions that are read, without `end`.
        first: the first position that is scored; so are all after it.
    """

    sequence: int
    begin: int
    end: int
    first: int

    @property
    def scored(self) -> slice:
        """The columns of the window's scores that belong to the positions from `first` on."""
        return slice(self.first - self.begin - 1, self.end - self.begin - 1)


def windows(sequence: int, length: int, first: int, limit: int, stride: int) -> Iterator[Window]:
    """Yields windows that score each position of a sequence once, from `first` on.

    Window k reads the positions k * stride to k * stride + limit - 1. A position is scored in the first window that
    reads
    it: in window 0 given everything before it, in the others given `limit - stride` to `limit - 1` tokens. So its score
    never depends on what follows, nor on the length of the text. Windows that would score nothing are left out.

    Args:
        sequence: the index of the sequence.
        length: the number of its tokens, including the begin token.
        first: the position of the first token to score, at least 1.
        limit: the largest number of tokens that the model reads.
        stride: how far the window moves, 1 to `limit - 1`.
    """
    begin, end = 0, min(limit, length)
    while True:
        if first < end:
            yield Window(sequence, begin, end, first)
            first = end
        if end == length:
            return
        begin += stride
        end = min(begin + limit, length)


def batches(parts: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Puts windows into batches of at most `batch_tokens` tokens, including padding; a longer window is alone.

    The longest windows come first: memory runs out at once or not at all, and there is little padding. The number of
    rows is a power of two, because compiled backends round it up to one.
    """
    ordered = sorted(parts, key=lambda window: window.begin - window.end)
    done = 0
    while done < len(ordered):
        longest = ordered[done].end - ordered[done].begin
        rows = 1 << (max(1, batch_tokens // longest).bit_length() - 1)
        yield ordered[done : done + rows]
        done += rows


def padded(sequences: Sequence[np.ndarray], batch: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a batch of windows, padded on the right, and the mask, both int64 [rows, length]."""
    longest = max(window.end - window.begin for window in batch)
    ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(batch):
        length = window.end - window.begin
        ids[row, :length] = sequences[window.sequence][window.begin : window.end]
        mask[row, :length] = 1
    return ids, mask
