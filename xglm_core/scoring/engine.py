"""Log-probabilities of given tokens, over a small protocol that each backend implements.

No array of batch x length x vocabulary exists. An engine computes one tile of logits at a time: some positions by a
part of the vocabulary. For each position it keeps the target's logit, the logarithm of the sum of exponentials, and the
largest logit with its id.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.generation.selection import Selection
from xglm_core.inputs import check_attention_mask, check_has_tokens, check_input_ids, check_positions
from xglm_core.rounding import power_of_two, rounded_up

# A tile has 16 MB in float32: products reach full speed, and the logits stay in the processor's cache afterwards.
# Smaller tiles would read the head more often.
TILE_POSITIONS = 1024
TILE_VOCABULARY = 4096


class ScoringEngine(Protocol):
    """The protocol by which scoring uses a backend.

    Attributes:
        bucket: rows are padded to a multiple of this many tokens, and their number to a power of two, so that compiled
            code is reused; 1 if nothing is compiled.
    """

    bucket: int

    def log_probabilities(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, sources: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs the model, and the head only on some positions.

        Args:
            input_ids: int64 [rows, length].
            attention_mask: 1 for tokens, 0 for padding, int64 [rows, length].
            sources: the positions that predict, row * length + column, int64 [targets].
            targets: the ids to predict, int64 [targets].

        Returns:
            log softmax(logits)[target], float32 [targets], and the id with the largest logit (the lowest id on ties),
            integers [targets].
        """
        ...


class CompiledScorer:
    """Implements `ScoringEngine` by a compiled function, for backends that compile.

    Args:
        compiled: (weights, ids, mask, sources, targets, chunks in use) -> the two results, [chunks, chunk] each, of
            sources and targets as `in_chunks` has them.
        weights: what it takes first, if weights are arguments.
    """

    bucket = 64

    def __init__(self, compiled: Callable[..., Any], *weights: Any) -> None:
        self._compiled = functools.partial(compiled, *weights)

    def log_probabilities(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, sources: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ScoringEngine.log_probabilities`."""
        places, wanted = in_chunks(sources, input_ids.size), in_chunks(targets, input_ids.size)
        filled = np.array(-(-len(targets) // places.shape[1]), np.int32)
        found = self._compiled(input_ids.astype(np.int32), attention_mask.astype(np.int32), places, wanted, filled)
        scores, likeliest = (np.asarray(array).reshape(-1)[: len(targets)] for array in found)
        return scores, likeliest


def score(
    engine: ScoringEngine, input_ids: np.ndarray, attention_mask: np.ndarray | None, config: XGLMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each token given those before it in its row, and the likeliest id in its place.

    Args:
        engine: the backend's engine.
        input_ids: integers [rows, length], padded anywhere.
        attention_mask: 1 for tokens, 0 for padding [rows, length]; None means no padding.
        config: the model's configuration.

    Returns:
        float32 [rows, length - 1]: column i belongs to token i + 1. It is 0 if this token is padding, or has only
        padding before it. And the likeliest id in its place (the lowest id on ties), int32 [rows, length - 1]; -1 where
        nothing is predicted.

    Raises:
        InputError: ids outside the vocabulary, a mask of another shape, a row without tokens, or one that is longer
            than `max_position_embeddings`.
    """
    check_input_ids(input_ids, config)
    rows, length = input_ids.shape
    mask = np.ones((rows, length), np.int64) if attention_mask is None else np.asarray(attention_mask)
    check_attention_mask(mask.shape, rows, 0, length)
    check_has_tokens(mask)
    check_positions(0, int(np.count_nonzero(mask, axis=1).max()) - 1, config)
    is_token = mask != 0
    # Each token is predicted from the last token before it. Padding may lie between the two.
    last = np.maximum.accumulate(np.where(is_token, np.arange(length), -1), axis=1)[:, :-1]
    scored = is_token[:, 1:] & (last >= 0)
    scores = np.zeros((rows, length - 1), np.float32)
    likeliest = np.full(scores.shape, -1, np.int32)
    if scored.any():
        padded_ids, padded_mask = (_padded(array, engine.bucket) for array in (input_ids, is_token))
        sources = (last + np.arange(rows)[:, None] * padded_ids.shape[1])[scored]
        targets = input_ids[:, 1:][scored].astype(np.int64)
        scores[scored], likeliest[scored] = engine.log_probabilities(padded_ids, padded_mask, sources, targets)
    return scores, likeliest


def in_chunks(values: np.ndarray, positions: int) -> np.ndarray:
    """Splits values [targets] into chunks of a tile's size, int32 [chunks, chunk].

    There is room for all positions, whatever the number of targets, so that compiled code has one shape. Zeros fill the
    rest.
    """
    chunk = min(positions, TILE_POSITIONS)
    chunks = np.zeros((-(-positions // chunk), chunk), np.int32)
    chunks.reshape(-1)[: len(values)] = values
    return chunks


def with_tile(
    ops: Selection, found: tuple[Any, ...], logits: Any, targets: Any, begin: Any, fresh: Any
) -> tuple[Any, ...]:
    """What is known of each target after one more tile of logits.

    Args:
        ops: the array operations of the framework.
        found: after the tiles before, [positions] each: the logarithm of the sum of exponentials, the target's logit,
            the largest logit, and its id.
        logits: float32 [positions, tile], of the ids from `begin` on.
        targets: int32 [positions].
        begin: the first id of the tile.
        fresh: the first id that no tile before has held.
    """
    log_sum_exp, own_logit, max_logit, likeliest = found
    places = targets - begin
    inside = (places >= 0) & (places < logits.shape[1])
    own_logit = ops.where(inside, ops.take(logits, ops.where(inside, places, 0)[:, None])[:, 0], own_logit)
    logits = ops.where(ops.iota(logits) + begin >= fresh, logits, -math.inf)
    place = ops.argmax(logits)
    highest = ops.take(logits, place[:, None])[:, 0]
    likeliest = ops.where(highest > max_logit, begin + place, likeliest)
    more = ops.logsumexp(logits)[:, 0]
    # log(exp(log_sum_exp) + exp(more)), where only the former may be -inf.
    larger = ops.where(log_sum_exp > more, log_sum_exp, more)
    log_sum_exp = larger + ops.log1p(ops.exp(-abs(log_sum_exp - more)))
    return log_sum_exp, own_logit, ops.where(highest > max_logit, highest, max_logit), likeliest


def _padded(array: np.ndarray, bucket: int) -> np.ndarray:
    """Pads an array [rows, length] with zeros on the right and below; returns int64."""
    rows, length = array.shape
    if bucket > 1:
        rows, length = power_of_two(rows), rounded_up(length, bucket)
    padded = np.zeros((rows, length), np.int64)
    padded[: len(array), : array.shape[1]] = array
    return padded
