"""The training loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xglm_core.inputs import IGNORED_LABEL


def causal_lm_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of each next token, in float32.

    Args:
        logits: [batch, length, vocab_size].
        labels: the tokens themselves, integers [batch, length]: position i is judged by label i + 1, the last by none;
            -100 does not count.
        num_items_in_batch: what to divide the sum by; None counts the labels that count.

    Returns:
        float32 scalar: 0 if no label counts.
    """
    targets = labels[:, 1:].flatten().long()
    predictions = logits[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(predictions, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED_LABEL).sum().clamp(min=1)
    return total / num_items_in_batch
