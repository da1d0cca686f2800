"""What matrices of int8 change: perplexity, and the likeliest tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Change:
    """How predictions differ from those of the floats.

    Attributes:
        targets: how many tokens are predicted: all but the first of each text.
        before, after: the perplexities with floats, and with int8.
        same: at how many of these tokens the likeliest one is the same.
    """

    targets: int
    before: float
    after: float
    same: int

    @property
    def ratio(self) -> float:
        """The perplexity after, divided by that before."""
        return self.after / self.before


def measure_change(found: np.ndarray, expected: np.ndarray, input_ids: np.ndarray, real: np.ndarray) -> Change | None:
    """Compares logits with those of floats; None if no text has a second token.

    Args:
        found, expected: [batch, length, vocab_size].
        input_ids: integers [batch, length].
        real: bool [batch, length], False for padding.
    """
    sums, targets, same = [0.0, 0.0], 0, 0
    for row, ids in enumerate(input_ids):  # Row by row, as temporaries with 256,008 logits per position are large.
        places = np.flatnonzero(real[row, :-1] & real[row, 1:])
        if len(places) == 0:
            continue
        both = [logits[row, places].astype(np.float64) for logits in (expected, found)]
        likeliest = [logits.argmax(axis=1) for logits in both]
        same += int((likeliest[0] == likeliest[1]).sum())
        targets += len(places)
        for index, logits in enumerate(both):
            largest = logits.max(axis=1)
            log_sums = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
            sums[index] += float((log_sums - logits[np.arange(len(places)), ids[places + 1]]).sum())
    if not targets:
        return None
    return Change(targets, math.exp(sums[0] / targets), math.exp(sums[1] / targets), same)
