"""Sums with a matrix as large as the head, in its own memory: a product, tile by tile, and single rows.

Hardware: CPUs. The plain form of each has a second such matrix for a while.
Gain: memory. A train step of 2 x 256 tokens at the 564M shape has a peak of 6.5 GB in place of 7.6, and takes 25 s in
place of 27, on two cores of an AMD EPYC (Zen 3). In code that XLA compiles, where rows are added in place anyway, tiles
save the product, 1 GB.
Date: 2026-11-28. Command: `xglm bench train2x256 --backend tf`, with and without `XGLM_PLAIN=1`.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from xglm_core.plain import use_plain

_TILE_BYTES = 2**24


def compiles() -> bool:
    """Whether XLA compiles what is traced now. To be asked outside of a `tf.function` of our own, which hides it."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def product_added(total: tf.Tensor, left: tf.Tensor, right: tf.Tensor, *, xla: bool) -> tf.Tensor:
    """The sum of `total` [vocab_size, d_model] and a product; see `compiles`."""
    if use_plain():
        return total + tf.matmul(left, right)
    vocab_size, width = total.shape
    height = max(1, _TILE_BYTES // (4 * width))

    def add(begin: int | tf.Tensor, total: tf.Tensor) -> tuple[int | tf.Tensor, tf.Tensor]:
        with tf.control_dependencies([total]):  # One tile after the other.
            tile = tf.matmul(left[begin : begin + height], right)
        return begin + height, _updated(total, begin, tile)

    if xla:  # It wants to know the places, and compiles each tile.
        for begin in range(0, vocab_size, height):
            _, total = add(begin, total)
        return total
    return tf.while_loop(lambda begin, _: begin < vocab_size, add, (0, total), parallel_iterations=1)[1]


def rows_added(total: tf.Tensor, index: tf.Tensor, rows: tf.Tensor, *, xla: bool) -> tf.Tensor:
    """`total` [vocab_size, d_model] with rows added to those of an index, which may repeat; see `compiles`."""
    if xla or use_plain():
        return tf.tensor_scatter_nd_add(total, index[:, None], rows)

    def add(number: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return number + 1, _updated(total, index[number], rows[number : number + 1])

    count = tf.shape(index)[0]
    return tf.while_loop(lambda number, _: number < count, add, (0, total), parallel_iterations=1)[1]


def _updated(total: tf.Tensor, begin: int | tf.Tensor, more: tf.Tensor) -> tf.Tensor:
    """`total` with `more` added from row `begin` on; in place where nothing else holds `total`."""
    end = begin + keras.ops.shape(more)[0]
    more = total[begin:end] + more
    return tf.raw_ops.TensorStridedSliceUpdate(input=total, begin=[begin], end=[end], strides=[1], value=more)
