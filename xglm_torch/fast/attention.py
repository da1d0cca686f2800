"""Attention with dropout of the probabilities on a CPU, for which PyTorch has no fused kernel.

The plain form is in `XGLMAttention.forward`: the probabilities, dropout of them, and a product.
Hardware: any CPU, float32.
Gain: works in place, and computes half of the scores of causal attention (2026-11-26).
Command: `python bench/speed.py torch train CHECKPOINT`, with and without `XGLM_PLAIN=1`.
"""

from __future__ import annotations

from typing import Any

import torch

from xglm_torch.fast.dropout import draws_bits, random_mask

_QUERIES = 128  # Of causal attention at a time: fewer compute less that is masked, more have larger products.


def attends_with_dropout(query: torch.Tensor, rate: float) -> bool:
    """Whether `attention_with_dropout` is to be used: for float32 on a CPU, where each operation need not be seen."""
    return draws_bits(query, rate) and query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def attention_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rate: float,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v with dropout of the probabilities.

    It reuses the memory of intermediate results, of which it keeps the probabilities and a byte for each.

    Args:
        query: float32 [batch, heads, length, head_dim].
        key, value: [batch, heads, keys, head_dim].
        mask: bool, True = attend, broadcast to [batch, heads, length, keys]; None = every key.
        rate: see `dropped`.
        is_causal: whether position i sees the keys 0 to i alone; needs as many keys as positions, and no mask.

    Returns:
        [batch, heads, length, head_dim].
    """
    if not is_causal:
        return _attention(query, key, value, mask, rate)
    contexts, end = [], 0
    for some in query.split(_QUERIES, dim=2):  # With the keys that they see.
        begin, end = end, end + some.shape[2]
        mask = torch.ones(1, 1, end - begin, end, dtype=torch.bool, device=query.device).tril(begin)
        contexts.append(_attention(some, key[:, :, :end], value[:, :, :end], mask, rate).transpose(1, 2))
    return torch.cat(contexts, dim=1).transpose(1, 2)  # In the layout in which the next projection reads it.


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, rate: float
) -> torch.Tensor:
    by_head = (tensor.flatten(0, 1) for tensor in (query, key, value))
    if mask is not None:
        mask = mask.expand(len(query), -1, -1, -1)
    context: torch.Tensor = _Attention.apply(*by_head, mask, rate)
    return context.unflatten(0, query.shape[:2])


class _Attention(torch.autograd.Function):
    """The same for query, key and value of shape [batch * heads, length, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, rate: float
    ) -> torch.Tensor:
        scores = torch.bmm(query * query.shape[2] ** -0.5, key.mT)
        _fill(scores, mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        kept, ctx.factor = random_mask(weights, rate)
        context = torch.bmm(weights * kept, value).mul_(ctx.factor)
        ctx.save_for_backward(query, key, value, mask, weights, kept, context)
        return context

    @staticmethod
    def backward(ctx: Any, grad_context: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, weights, kept, context = ctx.saved_tensors
        scale = query.shape[2] ** -0.5
        if torch.is_grad_enabled():  # Derivatives of the derivatives are wanted: single operations, then.
            scores = torch.bmm(query * scale, key.mT)
            _fill(scores, mask, torch.finfo(scores.dtype).min)
            context = torch.bmm(scores.softmax(dim=-1) * (kept * ctx.factor), value)
            wanted = [tensor for tensor in (query, key, value) if tensor.requires_grad]
            found = iter(torch.autograd.grad(context, wanted, grad_context, create_graph=True))
            return *(next(found) if is_wanted else None for is_wanted in ctx.needs_input_grad[:3]), None, None
        # The gradient of the softmax is w (g - sum(w g)); the sum is that of a product of narrower arrays.
        sums = (grad_context * context).sum(dim=-1, keepdim=True)
        grad_context = grad_context * ctx.factor
        grad_value = torch.bmm((weights * kept).mT, grad_context)
        grad_scores = torch.bmm(grad_context, value.mT).mul_(kept).sub_(sums).mul_(weights)
        _fill(grad_scores, mask, 0)  # Where no key is visible, the weights do not depend on the scores.
        grad_query, grad_key = torch.bmm(grad_scores, key).mul_(scale), torch.bmm(grad_scores.mT, query).mul_(scale)
        return grad_query, grad_key, grad_value, None, None


def _fill(scores: torch.Tensor, mask: torch.Tensor | None, value: float) -> None:
    """Overwrites the scores [batch * heads, length, keys] where the mask is False, in place."""
    if mask is not None:
        scores.unflatten(0, (len(mask), -1)).masked_fill_(~mask, value)
