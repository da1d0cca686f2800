"""Scores continuations as ids: how likely they are, and whether greedy generation would give them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.scoring.windows import Window, batches, padded

Pair = tuple[Sequence[int], Sequence[int]]


class GreedyScorer(Protocol):
    """A causal language model of any backend.

    Attributes:
        config: the model's configuration.
    """

    config: XGLMConfig

    def score(self, input_ids: Any, attention_mask: Any, *, return_likeliest: bool) -> tuple[Any, Any]:
        """Log-probabilities and the likeliest ids, both [rows, length - 1], for int64 arrays [rows, length]."""
        ...


def score_continuations(
    model: GreedyScorer, pairs: Sequence[Pair], batch_tokens: int
) -> Iterator[tuple[int, float, bool]]:
    """Scores continuations after their contexts, both as ids.

    The model reads each pair in one window: all of it, or as much of its end as the model can read.

    Args:
        model: the causal language model of any backend.
        pairs: contexts and continuations. Neither may be empty; a continuation must have fewer than
            `max_position_embeddings` ids.
        batch_tokens: the largest number of tokens in a batch, including padding; a single long pair may exceed it.

    Yields:
        For each pair, longest first: its index, the log-probability of the continuation [nats], and whether each id of
        the continuation is the likeliest one in its place (the lowest id on ties).
    """
    limit = model.config.max_position_embeddings
    sequences = [np.array([*context, *continuation], np.int64) for context, continuation in pairs]
    parts = [
        Window(number, max(0, len(sequence) - limit), len(sequence), len(context))
        for number, (sequence, (context, _)) in enumerate(zip(sequences, pairs, strict=True))
    ]
    for batch in batches(parts, batch_tokens):
        ids, mask = padded(sequences, batch)
        scores, likeliest = map(np.asarray, model.score(ids, mask, return_likeliest=True))
        is_likeliest = likeliest == ids[:, 1:]
        for row, window in enumerate(batch):
            counts = (row, window.scored)
            yield window.sequence, math.fsum(scores[counts].tolist()), bool(is_likeliest[counts].all())
