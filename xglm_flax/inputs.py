"""What a model call does before compiled code takes over.

Differs: PyTorch checks values on the way. Compiled code has shapes but no values, so here the checks come first.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_attention_mask, check_input_ids, check_positions
from xglm_flax.cache import FlaxXGLMCache, is_traced, with_room


def prepared_inputs(
    config: XGLMConfig,
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    past: FlaxXGLMCache | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, FlaxXGLMCache | None]:
    """Checks the arguments of a model call and brings them into the shapes that the compiled code knows.

    Returns:
        `input_ids`, the mask, if there is one, over all that the cache has room for, `position_ids`, and the cache.
    """
    if not is_traced(input_ids):
        check_input_ids(np.asarray(input_ids), config)
    batch, length = input_ids.shape
    if past is not None:
        past = with_room(past, length)
    seen = 0 if past is None else past.capacity - length if is_traced(past.length) else int(past.length)
    mask: Any = attention_mask
    if mask is not None:
        check_attention_mask(mask.shape, batch, seen, length)
        if past is not None and not is_traced(mask):
            # Without this, each further token would be another shape, and another compilation.
            mask = np.pad(np.asarray(mask) != 0, ((0, 0), (0, past.capacity - seen - length)))
    _check_positions(config, mask, position_ids, past, seen, length)
    return input_ids, mask, position_ids, past


def _check_positions(
    config: XGLMConfig,
    mask: jax.Array | None,
    position_ids: jax.Array | None,
    past: FlaxXGLMCache | None,
    seen: int,
    length: int,
) -> None:
    """Checks the positions given or counted, unless they are being traced."""
    if position_ids is not None:
        if not is_traced(position_ids):
            check_positions(int(np.min(position_ids)), int(np.max(position_ids)), config)
    elif is_traced(mask) or (past is not None and is_traced(past.length)):
        return
    elif mask is not None:
        check_positions(0, int(np.count_nonzero(mask, axis=1).max()) - 1, config)
    elif past is not None:
        known = np.count_nonzero(np.asarray(past.mask)[:, :seen], axis=1).max()
        check_positions(0, int(known) + length - 1, config)
    else:
        check_positions(0, length - 1, config)
