"""Log-probabilities of given tokens, written once over a small protocol that each backend implements.

No array of batch x length x vocabulary exists. An engine makes a tile of logits at a time, some positions by a part of
the vocabulary, and keeps of each position the target's logit, the log of the sum of exponentials, and the largest logit
with its id.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_attention_mask, check_has_tokens, check_input_ids, check_positions

# A tile of 16 MB in float32: products are as fast as they get, and what follows them finds the logits in the cache.
# Fewer positions at a time would read the whole head more often.
TILE_POSITIONS = 1024
TILE_VOCABULARY = 4096


class ScoringEngine(Protocol):
    """What a backend brings.

    Attributes:
        bucket: rows are padded to a multiple of this many tokens, and their number to a power of two, so that compiled
            code is reused; 1 where shapes are free.
    """

    bucket: int

    def log_probabilities(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, sources: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs the model, and its head on some positions alone.

        Args:
            input_ids: int64 [rows, length].
            attention_mask: 1 for tokens, 0 for padding, int64 [rows, length].
            sources: positions to predict from, row * length + column, int64 [targets].
            targets: the ids to predict, int64 [targets].

        Returns:
            log softmax(logits)[target], in float32 [targets], and the id with the largest logit, the first one of
            equals, in integers [targets].
        """
        ...


def score(
    engine: ScoringEngine, input_ids: np.ndarray, attention_mask: np.ndarray | None, config: XGLMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each token given those before it in its row, and what is likeliest in its place.

    Args:
        engine: the backend's engine.
        input_ids: integers [rows, length], padded anywhere.
        attention_mask: 1 for tokens, 0 for padding [rows, length]; None means no padding.
        config: the model's configuration.

    Returns:
        float32 [rows, length - 1]: column i is that of token i + 1; 0 where this is padding, or has only padding before
        it. And the likeliest id in that place, the first one of equals, int32 [rows, length - 1]; -1 where there is
        nothing to predict.

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
    # A token is predicted from the last one before it, which padding may separate from it.
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
    """Values [targets] as int32 [chunks, chunk], a chunk being what a tile takes of so many positions.

    There is room for all of the positions, whatever the number of targets, so that compiled code has one shape; zeros
    fill the rest.
    """
    chunk = min(positions, TILE_POSITIONS)
    chunks = np.zeros((-(-positions // chunk), chunk), np.int32)
    chunks.reshape(-1)[: len(values)] = values
    return chunks


def _padded(array: np.ndarray, bucket: int) -> np.ndarray:
    """The array [rows, length] in int64, with zeros on the right and below."""
    rows, length = array.shape
    if bucket > 1:
        rows, length = 1 << (rows - 1).bit_length(), -(-length // bucket) * bucket
    padded = np.zeros((rows, length), np.int64)
    padded[: len(array), : array.shape[1]] = array
    return padded
