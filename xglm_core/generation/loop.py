"""The generation loop, written once over a small protocol that each backend implements with compiled code."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.inputs import check_attention_mask, check_input_ids, check_positions

# Tokens to ask for between two looks at the end-of-text ids: rows that ended waste at most this many steps.
BLOCK = 16


class Engine(Protocol):
    """What a backend brings. Only token ids cross the border: the logits stay on the device.

    Attributes:
        bucket: prompt lengths and capacities are rounded up to multiples of this many tokens, so that compiled code is
            reused; 1 where shapes are free.
    """

    bucket: int

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, capacity: int) -> np.ndarray:
        """Reads the prompts and returns the next token of each row.

        Args:
            input_ids: prompts, padded on the left, int64 [rows, length].
            attention_mask: 1 for prompt tokens, 0 for padding, int64 [rows, length].
            capacity: positions that the cache must hold.

        Returns:
            Token ids [rows].
        """
        ...

    def advance(self, steps: int) -> np.ndarray:
        """Feeds the last token of each row and selects the next one, `steps` times; returns ids [rows, steps].

        Args:
            steps: 1 to `BLOCK`.
        """
        ...


def generate(
    engine: Engine,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    config: XGLMConfig,
    generation: GenerationConfig,
) -> np.ndarray:
    """Continues each row greedily: the likeliest token, until the row ends or is long enough.

    Args:
        engine: the backend's engine, used for this call alone.
        input_ids: prompts, integers [rows, length], padded on either side.
        attention_mask: 1 for tokens, 0 for padding [rows, length]; None means no padding.
        config: the model's configuration.
        generation: the options.

    Returns:
        `input_ids` as given with the new tokens appended, int64 [rows, length + new]; `new` is at most
        `max_new_tokens`, rows that ended earlier are filled with `pad_token_id`.

    Raises:
        InputError: ids outside the vocabulary, a row without tokens, a mask of another shape, or a text that would grow
            past `max_position_embeddings`.
    """
    check_input_ids(input_ids, config)
    rows, length = input_ids.shape
    mask = np.ones((rows, length), np.int64) if attention_mask is None else np.asarray(attention_mask)
    check_attention_mask(mask.shape, rows, 0, length)
    longest = _longest_prompt(mask)
    check_positions(0, longest + generation.max_new_tokens - 1, config)
    prompt = _rounded_up(longest, engine.bucket)
    capacity = prompt + _rounded_up(generation.max_new_tokens, engine.bucket)
    tokens = engine.prefill(*_left_padded(input_ids, mask, prompt, generation.pad_token_id), capacity)[:, None]
    ended = np.isin(tokens, generation.eos_token_id).any(axis=1)
    while not ended.all() and tokens.shape[1] < generation.max_new_tokens:
        block = engine.advance(min(BLOCK, generation.max_new_tokens - tokens.shape[1]))
        tokens = np.concatenate([tokens, block], axis=1)
        ended |= np.isin(block, generation.eos_token_id).any(axis=1)
    return np.concatenate([input_ids, _ended_at_eos(tokens, generation)], axis=1).astype(np.int64)


def _longest_prompt(mask: np.ndarray) -> int:
    """Tokens in the longest row."""
    lengths = (mask != 0).sum(axis=1)
    if lengths.min() == 0:
        raise InputError(f"attention_mask[{int(lengths.argmin())}] is all 0, expected at least one token in each row")
    return int(lengths.max())


def _left_padded(ids: np.ndarray, mask: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Moves the tokens of each row to its right end, in order, in rows of `length` columns."""
    padded_ids = np.full((len(ids), length), pad, np.int64)
    padded_mask = np.zeros((len(ids), length), np.int64)
    for row, keep in enumerate(mask != 0):
        kept = ids[row][keep]
        padded_ids[row, length - len(kept) :] = kept
        padded_mask[row, length - len(kept) :] = 1
    return padded_ids, padded_mask


def _ended_at_eos(tokens: np.ndarray, generation: GenerationConfig) -> np.ndarray:
    """Fills each row after its end with padding, and drops the columns that are padding in every row."""
    is_eos = np.isin(tokens, generation.eos_token_id)
    after_end = is_eos.cumsum(axis=1) - is_eos > 0
    return np.where(after_end, generation.pad_token_id, tokens)[:, ~after_end.all(axis=0)]


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
