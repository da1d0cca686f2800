"""What a model call does before compiled code takes over: the checks of `xglm_core.inputs`, and fixed shapes.

Compiled code has shapes but no values. So all checks come before it, and what is traced has its shapes checked alone.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from xglm_core import inputs as core
from xglm_core.calls import DecoderInputs
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_flax.cache import FlaxXGLMCache, is_traced, with_room


def checked_inputs(
    config: XGLMConfig, inputs: DecoderInputs, past: FlaxXGLMCache | None
) -> tuple[DecoderInputs, FlaxXGLMCache | None]:
    """Checks the inputs of the decoder and brings them into the shapes that the compiled code knows.

    Differs: PyTorch and TF check only, in `check_arguments`; they need no fixed shapes outside of generation.

    Returns:
        The inputs, in which the mask covers all that the cache has room for; and the cache, with room.

    Raises:
        InputError: see `xglm_core.inputs.check_arguments`; or the cache has no room.
    """
    tokens, mask = inputs.inputs_embeds if inputs.input_ids is None else inputs.input_ids, inputs.attention_mask
    length = (*np.shape(tokens), 0, 0)[1]
    seen, covered = _cached(past, length, mask)
    core.check_arguments(config, inputs, _look, past, seen, covered=covered, shape_of=known_shape)
    if past is not None:
        past = with_room(past, length)
        if mask is not None and (known := _look(mask)) is not None:
            # Without this, each further token would be another shape, and another compilation.
            mask = np.pad(known != 0, ((0, 0), (0, past.capacity - known.shape[1])))
    return inputs._replace(attention_mask=mask), past


def check_head_arguments(config: XGLMConfig, inputs: DecoderInputs, labels: Any, logits_to_keep: Any) -> None:
    """See `xglm_core.inputs.check_head_arguments`."""
    core.check_head_arguments(config, inputs, labels, logits_to_keep, _look, known_shape)


def check_dropout(config: XGLMConfig, train: bool, dropout_rng: jax.Array | None) -> None:
    """Raises `InputError` if dropout is to act without a key.

    Differs: PyTorch and Keras hold the state of their random generators themselves.
    """
    rates = (config.dropout, config.attention_dropout, config.activation_dropout, config.layerdrop)
    if train and dropout_rng is None and any(rates):
        raise InputError("train is True but dropout_rng is None, expected a key: dropout_rng=jax.random.key(0)")


def known_shape(array: Any) -> tuple[int | None, ...]:
    """A shape, with None where `jax.export` leaves a size open.

    Differs: PyTorch's shapes are always known, and TF's have None by themselves.
    """
    return tuple(size if isinstance(size, int) else None for size in np.shape(array))


def _look(array: Any) -> np.ndarray | None:
    """The values of an array; None if they cannot be looked at."""
    return None if is_traced(array) else np.asarray(array)


def _cached(past: FlaxXGLMCache | None, length: int, mask: Any) -> tuple[int | None, int]:
    """How many positions are cached, if that is known; and how many a mask has to cover besides the new ones."""
    if past is None:
        return 0, 0
    rest = past.capacity - length
    if is_traced(past.length):
        return None, rest
    seen = int(past.length)
    # Loops that were written for one shape give the mask of all positions to come.
    return seen, rest if past.fixed and mask is not None and known_shape(mask)[1:] == (past.capacity,) else seen
