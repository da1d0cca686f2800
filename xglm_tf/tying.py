"""The two uses of a tied matrix in training: one gradient as large as the vocabulary, where there would be two."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from xglm_tf.fast.adding import compiles, rows_added


def table_and_head(embedding: keras.layers.Embedding, ids: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor] | None:
    """Rows of the matrix for ids [batch, length], and the matrix as the loss of the same call is to read it.

    The gradient of the rows is then added in place to that of the loss. None where each use is to have a gradient of
    its own.

    Differs: each use has a gradient of its own in two cases more than in `xglm_torch.tying.with_one_gradient`: outside
    a `tf.function`, where the tape holds the gradient of the loss, which thus cannot be written to; and in other types
    than float32, where the lookup reads another matrix than the loss.
    """
    if ids is None or tf.executing_eagerly() or embedding.lora_enabled or not embedding.embeddings.trainable:
        return None
    if embedding.compute_dtype != "float32" or embedding.variable_dtype != "float32":
        return None
    rows, head = _both(tf.convert_to_tensor(embedding.embeddings), tf.cast(ids, tf.int32), xla=compiles())
    return rows, head


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
