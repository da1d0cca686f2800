"""From logits to tokens, on the device: the array operations of `xglm_core.generation.selection`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from xglm_core.generation.selection import Selection


def _put(array: tf.Tensor, ids: tf.Tensor, values: Any) -> tf.Tensor:
    rows, width = array.shape
    # One more column takes what lies beyond the last one.
    columns, ids = tf.pad(array, ((0, 0), (0, 1))), tf.minimum(ids, width)
    places = tf.stack([tf.broadcast_to(tf.range(rows)[:, None], ids.shape), ids], axis=-1)
    values = tf.broadcast_to(tf.convert_to_tensor(values, array.dtype), ids.shape)
    return tf.tensor_scatter_nd_update(columns, places, values)[:, :-1]


def _max(array: tf.Tensor) -> tf.Tensor:
    broken = tf.reduce_any(tf.math.is_nan(array), axis=-1, keepdims=True)
    return tf.where(broken, float("nan"), tf.reduce_max(array, axis=-1, keepdims=True))


def _argmax(array: tf.Tensor) -> tf.Tensor:
    """The first maximum; XLA does not vectorise `tf.argmax` on CPUs."""
    is_largest = array == tf.reduce_max(array, axis=-1, keepdims=True)
    return tf.reduce_min(tf.where(is_largest, _iota(array), array.shape[1]), axis=-1)


def _iota(array: tf.Tensor) -> tf.Tensor:
    return tf.broadcast_to(tf.range(array.shape[1]), array.shape)


selection = Selection(
    float32=lambda array: tf.cast(array, tf.float32),
    reshape=tf.reshape,
    broadcast_to=tf.broadcast_to,
    full_like=lambda array, value: tf.fill(array.shape, value),
    where=tf.where,
    put=_put,
    take=lambda array, places: tf.gather(array, places, batch_dims=1),
    iota=_iota,
    max=_max,
    argmax=_argmax,
    top=tf.math.top_k,  # Of equal elements, the first comes first.
    argsort=lambda array: tf.argsort(array, stable=True),
    isnan=tf.math.is_nan,
    exp=tf.exp,
    log=tf.math.log,
    log1p=tf.math.log1p,
    softmax=tf.nn.softmax,
    log_softmax=tf.nn.log_softmax,
    cumsum=lambda array: tf.cumsum(array, axis=-1),
    sum=lambda array: tf.reduce_sum(array, axis=-1, keepdims=True),
    logsumexp=lambda array: tf.reduce_logsumexp(array, axis=-1, keepdims=True),
    uint32=lambda ids: tf.cast(ids, tf.uint32),
    low_bits=tf.identity,
    right_shift=tf.bitwise.right_shift,
)
