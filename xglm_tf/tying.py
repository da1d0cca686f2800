"""The two uses of a tied matrix in training: one gradient as large as the vocabulary, where there would be two."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from xglm_tf.loss import rows_added


class TableAndHead:
    """The matrix of both, for one call: once it has been looked up in, `head` is what the loss of that call reads.

    The gradient of the lookup is then added in place to that of the loss.

    Attributes:
        head: the matrix [vocab_size, d_model]; None before the lookup.
    """

    def __init__(self, embedding: keras.layers.Embedding) -> None:
        self.embedding = embedding
        self.head: tf.Tensor | None = None

    def look_up(self, ids: tf.Tensor) -> tf.Tensor:
        """[batch, length, d_model] for ids [batch, length]."""
        xla = tf.__internal__.get_enclosing_xla_context() is not None
        matrix = tf.convert_to_tensor(self.embedding.embeddings)
        rows, self.head = _both(matrix, tf.cast(ids, tf.int32), xla=xla)
        return rows


def table_and_head(embedding: keras.layers.Embedding) -> TableAndHead | None:
    """None where each use is to have a gradient of its own.

    Differs: that is also so outside a `tf.function`, where the tape holds the gradient of the loss, which thus cannot
    be written to; and in other types than float32, where the lookup has another matrix than the loss.
    """
    if tf.executing_eagerly() or embedding.lora_enabled or not embedding.embeddings.trainable:
        return None
    if embedding.compute_dtype != "float32" or embedding.variable_dtype != "float32":
        return None
    return TableAndHead(embedding)


def _uses(matrix: tf.Tensor, ids: tf.Tensor, *, xla: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Rows and matrix. What arrives as the gradient of the second is written to, if nothing else holds it."""

    @tf.custom_gradient
    def uses(matrix: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable[..., tf.Tensor]]:
        def gradient(by_rows: tf.Tensor, by_head: tf.Tensor) -> tf.Tensor:
            rows = tf.reshape(by_rows, (-1, matrix.shape[1]))
            return rows_added(by_head, tf.reshape(ids, (-1,)), rows, xla)

        return (tf.gather(matrix, ids), tf.identity(matrix)), gradient

    return uses(matrix)


# See `_sums_traced` in `xglm_tf/loss.py` for why this is a function by itself.
_both = tf.function(_uses, autograph=False)
