"""Multi-head attention: to the positions before, and to encoder states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.config import XGLMConfig
from xglm_torch.dropout import dropped
from xglm_torch.fast.linear import linear_layer
from xglm_torch.recording import is_transformed


class XGLMAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + mask) v, with biased projections, softmax in at least float32.

    Args:
        config: the architecture.
        heads: which of its heads there are, by their original index.
        is_causal: whether no mask means that position i sees the keys 0 to i; else it means every key.
    """

    def __init__(self, config: XGLMConfig, heads: list[int], *, is_causal: bool) -> None:
        super().__init__()
        width = len(heads) * config.head_dim
        self.head_dim = config.head_dim
        self.heads = heads
        self.is_causal = is_causal
        self.dropout = config.attention_dropout
        self.k_proj = linear_layer(config.d_model, width)
        self.v_proj = linear_layer(config.d_model, width)
        self.q_proj = linear_layer(config.d_model, width)
        self.out_proj = linear_layer(width, config.d_model)

    def keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, length, d_model] -> what there is to attend to, each [batch, heads, length, head_dim]."""
        key, value, by_head = self.k_proj(states), self.v_proj(states), (*states.shape[:2], -1, self.head_dim)
        return key.reshape(by_head).transpose(1, 2), value.reshape(by_head).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        head_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from each position to the keys.

        Args:
            hidden_states: [batch, length, d_model].
            key, value: [batch, heads, keys, head_dim].
            mask: bool [batch or 1, 1, length or 1, keys], True = attend; None: see `is_causal`.
            head_mask: factors of the heads' probabilities [config.attention_heads]; None = 1.
            output_attentions: whether to return the probabilities, which takes a slower path.

        Returns:
            [batch, length, d_model], and the probabilities [batch, heads, length, keys] or None.
        """
        by_head = (*hidden_states.shape[:2], -1, self.head_dim)
        query, weights = self.q_proj(hidden_states).reshape(by_head).transpose(1, 2), None
        is_causal = self.is_causal and mask is None and bool(query.shape[2] > 1)  # Traced, a comparison is no bool.
        factors = None if head_mask is None else head_mask[self.heads].to(query)[:, None, None]
        dropout = self.dropout if self.training else 0.0
        # Transforms do not see through fused kernels. On a CPU there is none with dropout.
        if output_attentions or (dropout and query.device.type == "cpu") or is_transformed():
            if is_causal:
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            weights = _probabilities(query, key, mask)
            # What is returned is what acts, so that it has a gradient.
            weights, factors = weights if factors is None else weights * factors, None
            context = dropped(weights, dropout) @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
        if factors is not None:
            # The factor of a head's probabilities is one of its result, so that the fast path needs no probabilities.
            context = context * factors
        return self.out_proj(context.transpose(1, 2).flatten(2)), weights if output_attentions else None


def attention_mask_for(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Which keys each new position sees: those up to itself that are not padding.

    Args:
        mask: bool [batch, past + length], False for padding; None if there is none.
        past: cached positions.
        length: new positions.
        device: where to build the result.

    Returns:
        bool [batch or 1, 1, length, past + length], True = attend; None for what needs no mask: attention that is
        causal over the new positions alone, or one new position that sees every key.
    """
    if mask is None and (past == 0 or length == 1):
        return None
    slots = torch.arange(past + length, device=device)
    causal = slots <= slots[past:, None]
    return causal[None, None] if mask is None else causal & mask[:, None, None, :]


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, heads, length, keys] in the type of `query`."""
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        # Finite, so that a row without any visible key is a mean of values rather than NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).to(query.dtype)
