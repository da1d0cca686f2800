"""Checks of a call's arguments, made before any computation and with one wording for all backends.

The arrays are numpy views of the framework's tensors. A backend that is being traced (jit, export) has no values to
look at and skips the checks of values.
"""

from __future__ import annotations

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError


def check_input_ids(input_ids: np.ndarray, config: XGLMConfig) -> None:
    """Raises `InputError` unless `input_ids` is an integer matrix [batch, length] of ids of the vocabulary."""
    if input_ids.ndim != 2 or not np.issubdtype(input_ids.dtype, np.integer) or 0 in input_ids.shape:
        raise InputError(
            f"input_ids is {input_ids.dtype} {list(input_ids.shape)}, expected integers [batch, length], neither 0"
        )
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        bad = lowest if lowest < 0 else highest
        row, column = np.argwhere(input_ids == bad)[0]
        raise InputError(
            f"input_ids[{row}, {column}] is {bad}, expected 0 to {config.vocab_size - 1} "
            f"(vocab_size={config.vocab_size}); does the tokenizer belong to this checkpoint?"
        )


def check_attention_mask(shape: tuple[int, ...], batch: int, past: int, length: int) -> None:
    """Raises `InputError` unless the mask covers the cached and the new positions: [batch, past + length]."""
    if tuple(shape) != (batch, past + length):
        cached = f" ({past} cached and {length} new)" if past else ""
        raise InputError(f"attention_mask is {list(shape)}, expected [{batch}, {past + length}]{cached}")


def check_positions(lowest: int, highest: int, config: XGLMConfig) -> None:
    """Raises `InputError` if the positions leave the position table at either end."""
    if lowest < 0:
        raise InputError(
            f"position_ids hold {lowest}, expected 0 or more; padding may have any position, 0 for example"
        )
    if highest >= config.max_position_embeddings:
        raise InputError(
            f"position {highest} is past the limit of {config.max_position_embeddings} tokens; shorten the text or set "
            f"max_position_embeddings in config.json to {highest + 1} or more (the position table is computed)"
        )


def check_cache(past: int, length: int, capacity: int) -> None:
    """Raises `InputError` if the new positions do not fit into a cache of fixed capacity."""
    if past + length > capacity:
        raise InputError(
            f"the cache holds {past} of at most {capacity} positions, and {length} more do not fit; "
            f"create it with max_length={past + length} or more"
        )
