"""The two uses of a tied matrix in training: one gradient as large as the vocabulary, where PyTorch would make two."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xglm_torch.loss import has_plain_weight
from xglm_torch.products import is_transformed


def table_and_head(embedding: nn.Embedding, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The matrix of both, once for a sparse lookup and once for the loss of the same call.

    The gradient of the lookup is then added in place to that of the loss. None where each is to have its own: if they
    are not tied, one is adapted or hooked, or no gradient is recorded in the plain way.
    """
    weight = embedding.weight
    hooks = (embedding._forward_hooks, embedding._forward_pre_hooks, embedding._backward_hooks)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_transformed():
        return None
    if not has_plain_weight(head) or head.weight is not weight or any(hooks) or "forward" in vars(embedding):
        return None
    if type(weight) is not nn.Parameter or not weight.requires_grad or weight.is_meta:
        return None
    return _BothUses.apply(weight)


class _BothUses(torch.autograd.Function):
    """A matrix, twice. What arrives as the gradient of the second is the caller's alone, and written to."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        return weight.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, by_table: torch.Tensor | None, by_head: torch.Tensor | None) -> torch.Tensor | None:
        if by_table is None or by_head is None:  # A caller may have differentiated something else than the loss.
            return by_head if by_table is None else by_table.to_dense()
        return by_head.add_(by_table)
