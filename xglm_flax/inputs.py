"""What a model call does before compiled code takes over: the checks of `xglm_core.inputs`, and fixed shapes.

Compiled code has shapes but no values. So all checks come before it, and what is traced has its shapes checked alone.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from xglm_core.calls import DecoderInputs
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.inputs import (
    check_cache_batch,
    check_input_ids,
    check_labels,
    check_labels_shape,
    check_logits_to_keep,
    check_positions,
    check_shapes,
)
from xglm_flax.cache import FlaxXGLMCache, is_traced, with_room


def checked_inputs(
    config: XGLMConfig, inputs: DecoderInputs, past: FlaxXGLMCache | None
) -> tuple[DecoderInputs, FlaxXGLMCache | None]:
    """Checks the inputs of the decoder and brings them into the shapes that the compiled code knows.

    Differs: PyTorch and TF check only; they need no fixed shapes outside of generation.

    Returns:
        The inputs, in which the mask covers all that the cache has room for; and the cache, with room.

    Raises:
        InputError: see `xglm_core.inputs`.
    """
    seen = check_arguments(config, inputs, past)
    length, mask = np.shape(_tokens(inputs))[1], inputs.attention_mask
    if past is not None:
        past = with_room(past, length)
        if mask is not None and has_values(mask):
            # Without this, each further token would be another shape, and another compilation.
            mask = np.asarray(mask) != 0
            mask = np.pad(mask, ((0, 0), (0, past.capacity - mask.shape[1])))
    check_position_ids(config, inputs.position_ids, mask, past, seen, length)
    return inputs._replace(attention_mask=mask), past


def check_arguments(config: XGLMConfig, inputs: DecoderInputs, past: FlaxXGLMCache | None) -> int:
    """Checks which inputs of the decoder are given, their shapes, and the ids; returns the cached positions.

    Raises:
        InputError: see `xglm_core.inputs`.
    """
    shapes = {name: known_shape(array) for name, array in inputs._asdict().items() if array is not None}
    tokens = shapes.get("input_ids", shapes.get("inputs_embeds", ()))
    length = np.shape(_tokens(inputs))[1] if len(tokens) > 1 else 0
    seen, covered = _cached(past, length, mask=shapes.get("attention_mask"))
    check_shapes(config, shapes, past=covered, encoder_length=None if past is None else past.encoder_length)
    if past is not None:
        check_cache_batch(known_shape(past.mask)[0], tokens[0])
    if inputs.input_ids is not None and has_values(inputs.input_ids):
        check_input_ids(np.asarray(inputs.input_ids), config)
    return seen


def check_position_ids(
    config: XGLMConfig,
    position_ids: Any,
    mask: Any,
    past: FlaxXGLMCache | None,
    seen: int,
    length: int,
) -> None:
    """Checks the positions, given or counted, unless they are being traced.

    Differs: PyTorch and TF do this in `check_arguments`; here, training steps also check parts of a batch.
    """
    if position_ids is not None:
        if has_values(position_ids):
            check_positions(int(np.min(position_ids)), int(np.max(position_ids)), config)
    elif not has_values(mask) or (past is not None and is_traced(past.length)):
        return
    elif mask is not None:
        check_positions(0, int(np.count_nonzero(np.asarray(mask)[:, : seen + length], axis=1).max()) - 1, config)
    elif past is not None and has_values(past.mask):
        known = np.count_nonzero(np.asarray(past.mask)[:, :seen], axis=1).max()
        check_positions(0, int(known) + length - 1, config)
    elif past is None and isinstance(length, int):
        check_positions(0, length - 1, config)


def check_head_arguments(config: XGLMConfig, tokens: Any, labels: Any, logits_to_keep: Any) -> None:
    """Checks what only the causal language model takes; `tokens` are ids or embeddings, checked elsewhere."""
    if tokens is None:
        return
    if labels is not None:
        check_labels_shape(known_shape(labels), known_shape(tokens))
        if has_values(labels):
            check_labels(np.asarray(labels), config)
    if has_values(logits_to_keep):
        check_logits_to_keep(logits_to_keep, known_shape(tokens)[1])


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


def has_values(array: Any) -> bool:
    """Whether the values of an array can be looked at."""
    return not is_traced(array)


def _tokens(inputs: DecoderInputs) -> Any:
    return inputs.inputs_embeds if inputs.input_ids is None else inputs.input_ids


def _cached(past: FlaxXGLMCache | None, length: int, mask: tuple[int | None, ...] | None) -> tuple[int, int]:
    """How many positions are cached, and how many of them a mask has to cover besides the new ones."""
    if past is None:
        return 0, 0
    rest = past.capacity - length
    if is_traced(past.length):
        return rest, rest
    seen = int(past.length)
    # Loops that were written for one shape give the mask of all positions to come.
    return seen, rest if past.fixed and mask is not None and mask[1:] == (past.capacity,) else seen
