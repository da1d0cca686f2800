"""The training loss."""

from __future__ import annotations

import tensorflow as tf

from xglm_core.inputs import IGNORED_LABEL


def causal_lm_loss(
    logits: tf.Tensor, labels: tf.Tensor, num_items_in_batch: int | tf.Tensor | None = None
) -> tf.Tensor:
    """Cross-entropy of each next token, in float32.

    Args:
        logits: [batch, length, vocab_size].
        labels: the tokens themselves, integers [batch, length]: position i is judged by label i + 1, the last by none;
            -100 does not count.
        num_items_in_batch: what to divide the sum by; None counts the labels that count.

    Returns:
        float32 scalar: 0 if no label counts.
    """
    # Differs: the labels are shifted and padded, rather than the logits cut, which would copy them.
    targets = tf.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    counts = targets != IGNORED_LABEL
    # No kernel may see -100: XLA makes NaN of it.
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.where(counts, targets, 0), logits=tf.cast(logits, tf.float32)
    )
    total = tf.reduce_sum(tf.where(counts, losses, 0.0))
    if num_items_in_batch is None:
        num_items_in_batch = tf.maximum(tf.math.count_nonzero(counts), 1)
    return total / tf.cast(num_items_in_batch, tf.float32)
