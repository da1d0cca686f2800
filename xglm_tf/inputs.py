"""A call's arguments: their names, and checks. Values are looked at only where there are any, not while tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

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
from xglm_core.tokenization.encoding import BatchEncoding
from xglm_tf.cache import TFXGLMCache, register_tree

# Keras takes apart what `predict` and `fit` are given, and knows no dictionaries but Python's.
register_tree(
    BatchEncoding,
    lambda encoding: (encoding.values(), tuple(encoding)),
    lambda names, values: dict(zip(names, values, strict=True)),
)


def named_arguments(
    positional: Sequence[str], allowed: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name.

    Differs: Keras hands a model its inputs as one: the first argument may be a mapping of arguments by name, or a list
    or tuple of them in the documented order.

    Args:
        positional: the names of what may be given by position, in order.
        allowed: all names.
        args: arguments by position.
        kwargs: arguments by name.

    Raises:
        InputError: an argument is unknown, given twice, or one too many.
    """
    named: dict[str, Any] = {}
    first, *others = args or (None,)
    if isinstance(first, Mapping):
        named, args = dict(first), (None, *others)
    elif isinstance(first, list | tuple) and any(item is None or hasattr(item, "shape") for item in first):
        args = (*first, *others)
    if len(args) > len(positional):
        raise InputError(f"{len(args)} inputs are given, expected at most {len(positional)}: {', '.join(positional)}")
    by_position = {name: value for name, value in zip(positional, args, strict=False) if value is not None}
    given = [*named, *by_position, *kwargs]
    for name in given:
        if name not in allowed:
            raise InputError(f"the argument {name!r} is unknown, expected some of {', '.join(allowed)}")
        if given.count(name) > 1:
            raise InputError(f"{name} is given twice, expected once: among the inputs, by position, or by name")
    return {name: _as_tensor(name, value) for name, value in {**named, **by_position, **kwargs}.items()}


def check_arguments(config: XGLMConfig, past: TFXGLMCache | None, **arguments: tf.Tensor | None) -> None:
    """Checks which arguments of the decoder are given, their shapes, and the ids.

    Raises:
        InputError: see `xglm_core.inputs`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in arguments.items() if tensor is not None}
    check_shapes(
        config,
        shapes,
        past=0 if past is None else past.known_length,
        encoder_length=None if past is None else past.encoder_length,
    )
    if past is not None:
        check_cache_batch(past.batch, shapes["input_ids" if "input_ids" in shapes else "inputs_embeds"][0])
    input_ids = arguments["input_ids"]
    if input_ids is not None and has_values(input_ids):
        check_input_ids(input_ids.numpy(), config)


def check_position_ids(config: XGLMConfig, position_ids: tf.Tensor) -> None:
    """Checks the positions, given or counted."""
    if has_values(position_ids):
        check_positions(int(tf.reduce_min(position_ids)), int(tf.reduce_max(position_ids)), config)


def check_head_arguments(
    config: XGLMConfig,
    tokens: tf.Tensor | None,
    labels: tf.Tensor | None,
    logits_to_keep: int | tf.Tensor,
) -> None:
    """Checks what only the causal language model takes; `tokens` are ids or embeddings, checked elsewhere."""
    if tokens is None:
        return
    if labels is not None:
        check_labels_shape(labels.shape, tokens.shape)
        if has_values(labels):
            check_labels(labels.numpy(), config)
    if isinstance(logits_to_keep, int):
        check_logits_to_keep(logits_to_keep, tokens.shape[1])
    elif has_values(logits_to_keep):
        check_logits_to_keep(np.asarray(logits_to_keep), tokens.shape[1])


def has_values(tensor: tf.Tensor) -> bool:
    """Whether the values of a tensor can be looked at."""
    return tf.executing_eagerly()


def _as_tensor(name: str, value: Any) -> Any:
    """Nested lists of numbers as an array; anything else as it is."""
    if not isinstance(value, list | tuple) or name == "past_key_values":
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise InputError(f"{name} has rows of different lengths, which fit no tensor; expected padded rows") from None
