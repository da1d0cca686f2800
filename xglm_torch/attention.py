"""Multi-head self-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.config import XGLMConfig
from xglm_torch.cache import XGLMCache


class XGLMAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + mask) v, with biased projections, softmax in float32."""

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__()
        self.num_heads = config.attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, cache: XGLMCache | None, layer: int
    ) -> torch.Tensor:
        """Attends from each new position to the cached and the new ones.

        Args:
            hidden_states: [batch, length, d_model].
            mask: bool [batch or 1, 1, length, keys], True = attend; None = causal over the new positions alone, or one
                new position that sees every key.
            cache: where the new keys and values go, or None.
            layer: index of this block in the cache.

        Returns:
            [batch, length, d_model].
        """
        query = self._split_heads(self.q_proj(hidden_states))
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states))
        if cache is not None:
            key, value = cache.write(layer, key, value)
        # `is_causal` aligns the first query with the first key, so it is only right where there are as many of each.
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and query.shape[2] > 1,
        )
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, length, d_model] -> [batch, heads, length, head_dim]."""
        return states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def attention_mask_for(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Which keys each new position sees: those up to itself that are not padding.

    Args:
        mask: bool [batch, past + length], False for padding; None if there is none.
        past: cached positions.
        length: new positions.
        device: where to build the result.

    Returns:
        bool [batch or 1, 1, length, past + length], True = attend; None where `XGLMAttention` needs none.
    """
    if mask is None and (past == 0 or length == 1):
        return None
    slots = torch.arange(past + length, device=device)
    causal = slots <= slots[past:, None]
    return causal[None, None] if mask is None else causal & mask[:, None, None, :]
