"""The two uses of a tied matrix in training: one gradient as large as the vocabulary, where there would be two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from xglm_core.calls import DecoderInputs
from xglm_tf.fast.adding import compiles, rows_added


def with_one_gradient(model: Any, inputs: DecoderInputs) -> tuple[DecoderInputs, Any]:
    """The inputs of a training call with labels, and what its loss is to read: a `Dense` head, or the tied matrix.

    If the matrix is tied, the gradient of the rows that are looked up is added in place to that of the loss.

    Differs: each use has a gradient of its own in two cases more than in `xglm_torch.tying.with_one_gradient`: outside
    a `tf.function`, where the tape holds the gradient of the loss, which thus cannot be written to; and in other types
    than float32, where the lookup reads another matrix than the loss.
    """
    embedding, ids = model.model.embed_tokens, inputs.input_ids
    if model.lm_head is not None:
        return inputs, model.lm_head
    is_plain = embedding.compute_dtype == embedding.variable_dtype == "float32" and not embedding.lora_enabled
    if ids is None or tf.executing_eagerly() or not is_plain or not embedding.embeddings.trainable:
        return inputs, embedding.embeddings
    rows, matrix = _both(tf.convert_to_tensor(embedding.embeddings), tf.cast(ids, tf.int32), xla=compiles())
    return inputs._replace(input_ids=None, inputs_embeds=embedding.scaled(rows)), matrix


def _uses(matrix: tf.Tensor, ids: tf.Tensor, *, xla: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Rows and matrix. What arrives as the gradient of the second is written to, if nothing else holds it."""

    @tf.custom_gradient
    def uses(matrix: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable[..., tf.Tensor]]:
        def gradient(grad_rows: tf.Tensor, grad_head: tf.Tensor) -> tf.Tensor:
            rows = tf.reshape(grad_rows, (-1, matrix.shape[1]))
            return rows_added(grad_head, tf.reshape(ids, (-1,)), rows, xla=xla)

        return (tf.gather(matrix, ids), tf.identity(matrix)), gradient

    return uses(matrix)


# See `_sums_traced` in `xglm_tf/loss.py` for why this is a function by itself.
_both = tf.function(_uses, autograph=False)
