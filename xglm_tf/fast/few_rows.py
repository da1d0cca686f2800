"""Logits of few rows, as in steps of `generate`.

Hardware: CPUs, with XLA.
"""

from __future__ import annotations

import math

import tensorflow as tf

from xglm_core.plain import use_plain

_FEW_ROWS, _PARTS = 16, 8


def table_product(states: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """[rows, vocab_size] for states [rows, d_model] and a table [vocab_size, d_model]."""
    rows, (vocab_size, d_model) = states.shape[0], table.shape
    if use_plain() or rows is None or rows > _FEW_ROWS:
        return tf.matmul(states, table, transpose_b=True)
    # XLA's product is twice as fast with the table on the left, which it would undo without the parts.
    parts = math.gcd(vocab_size, _PARTS)
    left = tf.reshape(table, (parts, vocab_size // parts, d_model))
    products = tf.matmul(left, tf.broadcast_to(states, (parts, rows, d_model)), transpose_b=True)
    return tf.transpose(tf.reshape(products, (vocab_size, rows)))
