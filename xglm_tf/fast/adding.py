"""Sums in place, where TensorFlow would make a second matrix as large as the head.

Hardware: CPUs.
"""

from __future__ import annotations

import functools

import tensorflow as tf

from xglm_core.plain import use_plain

# What of a product is computed before it is added to the rest, in bytes. XLA compiles each tile.
_TILE_BYTES, _XLA_TILE_BYTES = 2**22, 2**24


def adding_form() -> str:
    """How what is traced now adds: "plain", "xla", "fused" or "tiles". Each is slow where another is fast."""
    if use_plain():
        return "plain"
    if tf.__internal__.get_enclosing_xla_context() is not None:
        return "xla"
    return "fused" if products_add() else "tiles"


def product_added(total: tf.Tensor, left: tf.Tensor, right: tf.Tensor, index: tf.Tensor, form: str) -> tf.Tensor:
    """The sum of total and left right, without the whole product in memory.

    Args:
        total: [vocab_size, d_model].
        left: [vocab_size, positions].
        right: [positions, d_model].
        index: any number from 0 on, that is not known beforehand.
        form: see `adding_form`.
    """
    vocab_size, width = total.shape
    if form == "plain":
        return total + tf.matmul(left, right)
    if form == "fused" and not tf.executing_eagerly():
        # One operation, which adds to the memory of its last operand. It asks for a bias, and for one that is not
        # known to be 0: that would be left out, and the rest be two operations.
        bias = tf.fill((width,), tf.cast(tf.minimum(index, 0), tf.float32))
        return tf.nn.bias_add(tf.matmul(left, right), bias) + total
    height = max(1, (_XLA_TILE_BYTES if form == "xla" else _TILE_BYTES) // (4 * width))
    if form == "xla":
        for begin in range(0, vocab_size, height):
            with tf.control_dependencies([total]):  # One tile after the other.
                tile = tf.matmul(left[begin : begin + height], right)
            total = _updated(total, begin, tile)
        return total

    def step(begin: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tile = tf.matmul(left[begin : begin + height], right)
        places = tf.range(begin, begin + tf.shape(tile)[0])
        # This writes to its operand whatever else holds it. Nothing does, and it needs no copy of the old values.
        return begin + height, tf.raw_ops.InplaceAdd(x=total, i=places, v=tile)

    # One is added while the next is computed.
    _, total = tf.while_loop(lambda begin, _: begin < vocab_size, step, (0, total), parallel_iterations=2)
    return total


@functools.cache
def products_add() -> bool:
    """Whether a graph's product with a bias and a sum is one operation: on CPUs, where oneDNN computes products."""
    try:
        from tensorflow.python.util._pywrap_util_port import IsMklEnabled
    except ImportError:  # The module is not a public one.
        return False
    return IsMklEnabled() and not tf.config.list_logical_devices("GPU") and not tf.config.list_logical_devices("TPU")


def rows_added(matrix: tf.Tensor, index: tf.Tensor, rows: tf.Tensor, form: str) -> tf.Tensor:
    """A matrix with rows added to those of an index, which may repeat."""
    if form in ("plain", "xla"):  # XLA does it in place.
        return tf.tensor_scatter_nd_add(matrix, index[:, None], rows)
    width = matrix.shape[1]

    def step(number: tf.Tensor, flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return number + 1, _updated(flat, index[number] * width, rows[number])

    count = tf.shape(index)[0]
    flat = tf.reshape(matrix, (-1,))
    _, flat = tf.while_loop(lambda number, _: number < count, step, (0, flat), parallel_iterations=1)
    return tf.reshape(flat, matrix.shape)


def _updated(total: tf.Tensor, begin: int | tf.Tensor, more: tf.Tensor) -> tf.Tensor:
    """`total` with `more` added from row `begin` on; in place where nothing else holds `total`."""
    height = more.shape[0]
    old = tf.slice(total, [begin, *[0] * (len(more.shape) - 1)], more.shape)
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=total, begin=[begin], end=[begin + height], strides=[1], value=old + more
    )
