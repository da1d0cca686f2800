"""The training loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xglm_core.inputs import IGNORED_LABEL


def causal_lm_loss(
    logits: jax.Array, labels: jax.Array, num_items_in_batch: int | jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of each next token, in float32.

    Args:
        logits: [batch, length, vocab_size].
        labels: the tokens themselves, integers [batch, length]: position i is judged by label i + 1, the last by none;
            -100 does not count.
        num_items_in_batch: what to divide the sum by; None counts the labels that count.

    Returns:
        float32 scalar: 0 if no label counts.
    """
    targets = labels[:, 1:]
    predictions = logits[:, :-1].astype(jnp.float32)
    counts = targets != IGNORED_LABEL
    # Differs: written out, and with 0 for -100, which as an index would give NaN.
    of_targets = jnp.take_along_axis(predictions, jnp.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    total = jnp.where(counts, jax.nn.logsumexp(predictions, axis=-1) - of_targets, 0.0).sum()
    if num_items_in_batch is None:
        num_items_in_batch = jnp.maximum(counts.sum(), 1)
    return total / num_items_in_batch
