"""Dropout on a CPU, where PyTorch draws a number for each bit of a mask, and has no fused attention with dropout.

Elsewhere, and wherever the single operations must be seen (compiling, function transforms), PyTorch's own is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from xglm_core.dropout import BITS, drop_level
from xglm_torch.products import is_plain, is_transformed

_QUERIES = 128  # Of causal attention at a time: fewer compute less that is masked, more have larger products.


def dropped(states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Dropout, as `F.dropout`, which on a CPU keeps four bytes for each number's gradient where this keeps one.

    Args:
        states: of any shape and type.
        rate: drop probability in [0, 1]; for a CPU see `drop_level`.
        training: whether to drop at all.
    """
    if not training or not rate:
        return states
    if not _draws(states, rate):
        return torch.native_dropout(states, rate, True)[0]
    kept, factor = _mask(states, rate)
    return (states * kept).mul_(factor)


def attends_with_dropout(query: torch.Tensor, rate: float) -> bool:
    """Whether `attention_with_dropout` is to be used: for float32 on a CPU, where each operation need not be seen."""
    return _draws(query, rate) and is_plain(query) and not torch.is_autocast_enabled("cpu")


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
        scores = torch.bmm(query, key.mT).mul_(query.shape[2] ** -0.5)
        _fill(scores, mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        kept, ctx.factor = _mask(weights, rate)
        context = torch.bmm(weights * kept, value).mul_(ctx.factor)
        ctx.save_for_backward(query, key, value, mask, weights, kept, context)
        return context

    @staticmethod
    def backward(ctx: Any, by_context: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, weights, kept, context = ctx.saved_tensors
        scale = query.shape[2] ** -0.5
        if torch.is_grad_enabled():  # Derivatives of the derivatives are wanted: single operations, then.
            scores = torch.bmm(query, key.mT) * scale
            _fill(scores, mask, torch.finfo(scores.dtype).min)
            context = torch.bmm(scores.softmax(dim=-1) * (kept * ctx.factor), value)
            wanted = [tensor for tensor in (query, key, value) if tensor.requires_grad]
            found = iter(torch.autograd.grad(context, wanted, by_context, create_graph=True))
            return *(next(found) if is_wanted else None for is_wanted in ctx.needs_input_grad[:3]), None, None
        # The gradient of the softmax is w (g - sum(w g)); the sum is that of a product of narrower arrays.
        sums = (by_context * context).sum(dim=-1, keepdim=True)
        by_context = by_context * ctx.factor
        by_value = torch.bmm((weights * kept).mT, by_context)
        by_scores = torch.bmm(by_context, value.mT).mul_(kept).sub_(sums).mul_(weights)
        _fill(by_scores, mask, 0)  # Where no key is visible, the weights do not depend on the scores.
        return torch.bmm(by_scores, key).mul_(scale), torch.bmm(by_scores.mT, query).mul_(scale), by_value, None, None


def _fill(scores: torch.Tensor, mask: torch.Tensor | None, value: float) -> None:
    """Overwrites the scores [batch * heads, length, keys] where the mask is False, in place."""
    if mask is not None:
        scores.unflatten(0, (len(mask), -1)).masked_fill_(~mask, value)


def _draws(states: torch.Tensor, rate: float) -> bool:
    """Whether masks are drawn here: not for what means something else, such as a DTensor."""
    plain = type(states) is torch.Tensor and states.device.type == "cpu"
    return plain and rate < 1 and not (torch.compiler.is_compiling() or is_transformed())


def _mask(like: torch.Tensor, rate: float) -> tuple[torch.Tensor, float]:
    """Which numbers stay, bool in the shape of `like`, and what to multiply them by."""
    level, factor = drop_level(rate)
    words = torch.empty(math.ceil(like.numel() / 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    kept = words.view(torch.int16)[: like.numel()] >= level - 2 ** (BITS - 1)
    return kept.view(like.shape), factor
