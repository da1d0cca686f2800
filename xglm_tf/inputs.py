"""A call's arguments: their names, and checks. Values are looked at only where there are any, not while tracing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from xglm_core import inputs as core
from xglm_core.calls import DecoderInputs
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.inputs import (
    IGNORED_LABEL,
    check_input_ids,
    check_labels,
    check_positions,
    check_positions_of,
    plain_input,
)
from xglm_core.tokenization.encoding import BatchEncoding
from xglm_tf.cache import TFXGLMCache, register_tree

_FAILED = "a batch fails its checks"

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

    Differs: Keras hands a model all inputs as one. So the first argument may be a list or tuple of arguments in the
    documented order, where `xglm_core.inputs.inputs_as_given` takes a mapping by name alone.

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
    return {name: plain_input(name, value) for name, value in {**named, **by_position, **kwargs}.items()}


def check_arguments(config: XGLMConfig, inputs: DecoderInputs, past: TFXGLMCache | None) -> None:
    """See `xglm_core.inputs.check_arguments`. Differs: in Flax `checked_inputs` also fixes their shapes."""
    look = np.asarray if tf.executing_eagerly() else None
    core.check_arguments(config, inputs, look, past, 0 if past is None else past.known_length)


def check_head_arguments(
    config: XGLMConfig, inputs: DecoderInputs, labels: tf.Tensor | None, logits_to_keep: int | tf.Tensor
) -> None:
    """See `xglm_core.inputs.check_head_arguments`."""
    core.check_head_arguments(config, inputs, labels, logits_to_keep, _look)


def are_arrays(x: Any) -> bool:
    """Whether the first argument of `fit` or `predict` is the data itself, and no dataset that yields it.

    Differs: only Keras has `fit` and `predict`, unlike PyTorch and Flax.
    """
    return isinstance(x, Mapping | list | tuple) or (hasattr(x, "shape") and hasattr(x, "dtype"))


def batches_in_tuples(x: Any) -> Any:
    """A generator of batches as Keras wants it, where they may be mappings; anything else as it is.

    Differs: only Keras has `fit` and `predict`, unlike PyTorch and Flax.
    """
    if not isinstance(x, Iterator) or isinstance(x, tf.data.Iterator):
        return x
    return ((dict(batch),) if isinstance(batch, Mapping) else batch for batch in x)


def check_batch(config: XGLMConfig, inputs: Mapping[str, Any], labels: Any) -> None:
    """Checks ids, positions and labels of data for `fit`, `evaluate` or `predict` that are arrays, before any step.

    Differs: only Keras has `fit`; in PyTorch and Flax each call checks its own arguments.

    Raises:
        InputError: ids or labels are outside the vocabulary, or a text is longer than the model can read.
    """
    if "input_ids" in inputs:
        check_input_ids(np.asarray(inputs["input_ids"]), config)
    if labels is not None:
        check_labels(np.asarray(labels), config)
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if tokens is not None:
        given = inputs.get("position_ids"), inputs.get("attention_mask")
        check_positions_of(config, np.asarray, *given, (*np.shape(tokens), 0, 0)[1])


def checked_batch(config: XGLMConfig, inputs: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """The inputs of a step; what reads them is computed only if they pass the checks of `check_batch`.

    Compiled code can say no more than the extremes; see `failures_named`.

    Differs: only Keras has `fit`; in PyTorch and Flax each call checks its own arguments.

    Raises:
        InputError: see `check_batch`; where there are values to look at.
    """
    name = "inputs_embeds" if inputs.get("input_ids") is None else "input_ids"
    if name not in inputs or len(inputs[name].shape) < 2:
        return dict(inputs)  # Of which the call says what is wrong.
    if tf.executing_eagerly():
        check_batch(config, inputs, labels)
        return dict(inputs)
    with tf.device("CPU"):  # There they are, as they come from a dataset.
        ids = tf.zeros((1, 1), tf.int64) if name == "inputs_embeds" else tf.cast(inputs[name], tf.int64)
        labels = tf.zeros((1, 1), tf.int64) if labels is None else tf.cast(labels, tf.int64)
        labels = tf.where(labels == IGNORED_LABEL, tf.zeros_like(labels), labels)
        positions = _lowest_and_highest_position(inputs)
        of_tokens = (reduce(array) for array in (ids, labels) for reduce in (tf.reduce_min, tf.reduce_max))
        extremes = [*positions, *of_tokens]
        found = tf.stack([tf.cast(extreme, tf.int64) for extreme in extremes])
        limits = tf.constant([config.max_position_embeddings, config.vocab_size, config.vocab_size], tf.int64)
        fits = tf.reduce_all((found[::2] >= 0) & (found[1::2] < limits))
        passed = tf.debugging.Assert(fits, [_FAILED, found], summarize=len(extremes))
    with tf.control_dependencies([passed]):
        return {**inputs, name: tf.identity(inputs[name])}


@contextlib.contextmanager
def failures_named(config: XGLMConfig) -> Iterator[None]:
    """Raises what `checked_batch` has found as an `InputError`.

    Differs: only Keras has `fit`; in PyTorch and Flax each call checks its own arguments.

    Raises:
        InputError: see `check_batch`.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = re.search(rf"{_FAILED}\] \[([-\d ]+)\]", str(error))
        if found is None:
            raise
        (lowest, highest), *others = np.reshape([int(number) for number in found[1].split()], (-1, 2)).tolist()
    else:
        return
    check_positions(lowest, highest, config)
    for name, (lowest, highest) in zip(("input_ids", "labels"), others, strict=True):
        if lowest < 0 or highest >= config.vocab_size:
            bad = lowest if lowest < 0 else highest
            raise InputError(
                f"{name} hold {bad}, expected 0 to {config.vocab_size - 1} (vocab_size={config.vocab_size}); "
                "does the tokenizer belong to this checkpoint?"
            )


def _lowest_and_highest_position(inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Counted, if they are not given."""
    if (position_ids := inputs.get("position_ids")) is not None:
        return tf.reduce_min(position_ids), tf.reduce_max(position_ids)
    if (mask := inputs.get("attention_mask")) is not None:
        return 0, tf.reduce_max(tf.math.count_nonzero(mask, axis=1)) - 1
    return 0, keras.ops.shape(inputs.get("input_ids", inputs.get("inputs_embeds")))[1] - 1


def is_traced(*values: Any) -> bool:
    """Whether this is inside of a `tf.function`, or some of the values are Keras' symbols."""
    return not tf.executing_eagerly() or any(map(keras.backend.is_keras_tensor, values))


def _look(tensor: Any) -> np.ndarray | None:
    """The values of a tensor; None if they cannot be looked at."""
    return np.asarray(tensor) if tf.executing_eagerly() else None
