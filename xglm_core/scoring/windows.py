"""Sequences in windows that a model can read, and windows in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A part of a sequence that the model reads at once.

    Attributes:
        sequence: which sequence.
        begin, end: the places that are read, `end` excluded.
        first: the first of them that is scored; all after it are, too.
    """

    sequence: int
    begin: int
    end: int
    first: int

    @property
    def scored(self) -> slice:
        """The columns of what `score` gives for the window that belong to its places from `first` on."""
        return slice(self.first - self.begin - 1, self.end - self.begin - 1)


def windows(sequence: int, length: int, first: int, limit: int, stride: int) -> Iterator[Window]:
    """Windows that score each place of a sequence once, from `first` on.

    Window k reads the places k * stride to k * stride + limit - 1. A place is scored in the first window that reads it:
    given everything before it in the first window, and `limit - stride` to `limit - 1` tokens in the others. So its
    score never depends on what follows, nor on how long the text is. Windows that would score nothing are left out.

    Args:
        sequence: its number.
        length: its number of tokens, the begin token included.
        first: place of the first token to score, at least 1.
        limit: most tokens that the model reads.
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
    """Windows in batches of at most `batch_tokens` tokens, padding included; a longer one is a batch of its own.

    The longest come first: memory runs out at once or not at all, and little is padded. Their number is a power of two,
    as backends that compile round it up to one.
    """
    ordered = sorted(parts, key=lambda window: window.begin - window.end)
    done = 0
    while done < len(ordered):
        longest = ordered[done].end - ordered[done].begin
        rows = 1 << (max(1, batch_tokens // longest).bit_length() - 1)
        yield ordered[done : done + rows]
        done += rows


def padded(sequences: Sequence[np.ndarray], batch: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a batch of windows, padded on the right, and their mask, int64 [rows, length]."""
    longest = max(window.end - window.begin for window in batch)
    ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(batch):
        length = window.end - window.begin
        ids[row, :length] = sequences[window.sequence][window.begin : window.end]
        mask[row, :length] = 1
    return ids, mask
