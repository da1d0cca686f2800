"""Ids after ids: how likely continuations are, and whether they are what greedy generation would give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.scoring.windows import Window, batches, padded

Pair = tuple[Sequence[int], Sequence[int]]


class GreedyScorer(Protocol):
    """What scores ids and knows likelier ones: the causal language model of any backend.

    Attributes:
        config: its configuration.
    """

    config: XGLMConfig

    def score(self, input_ids: Any, attention_mask: Any, *, return_likeliest: bool) -> tuple[Any, Any]:
        """Log-probabilities and the likeliest ids, both [rows, length - 1], for int64 arrays [rows, length]."""
        ...


def score_continuations(
    model: GreedyScorer, pairs: Sequence[Pair], batch_tokens: int
) -> Iterator[tuple[int, float, bool]]:
    """Scores continuations after their contexts, both as ids.

    The model reads one window of each: all of it, or as much of its end as the context has places for.

    Args:
        model: the causal language model of any backend.
        pairs: contexts and continuations; neither may be empty, and a continuation has fewer than
            `max_position_embeddings` ids.
        batch_tokens: most tokens of a batch, padding included; one long pair may be more.

    Yields:
        Of each pair, the longest first, its number, the log-probability of its continuation [nats], and whether each of
        its ids is the likeliest in its place, the first one of equals.
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
