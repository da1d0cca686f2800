"""One block: self-attention, cross-attention, and a feed-forward layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_torch.attention import XGLMAttention
from xglm_torch.cache import KeyValue, XGLMCache
from xglm_torch.dropout import dropped

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
}


class XGLMDecoderLayer(nn.Module):
    """One pre-norm block: self-attention, attention to encoder states if there are any, and a feed-forward layer.

    Each is x + f(norm(x)); the last is fc2(activation(fc1(norm(x)))).
    """

    def __init__(self, config: XGLMConfig, index: int) -> None:
        super().__init__()
        activation = config.activation_function
        self.index = index
        self.self_attn = XGLMAttention(config, config.kept_heads(index))
        if config.add_cross_attention:
            self.encoder_attn = XGLMAttention(config, list(range(config.attention_heads)))
            self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.activation_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        cache: XGLMCache | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Runs the block.

        Args:
            hidden_states: [batch, length, d_model].
            mask: see `attention_mask_for`.
            cache: where the new keys and values go, and those of the encoder come from if it holds any; or None.
            encoder_hidden_states: [batch, encoder length, d_model], or None.
            encoder_mask: bool [batch, 1, 1, encoder length], True = attend; None = every position.
            head_mask, cross_attn_head_mask: this block's rows, [config.attention_heads], or None.
            output_attentions: whether to return the probabilities of both attentions.

        Returns:
            [batch, length, d_model], and the probabilities of self-attention and cross-attention, or None.
        """
        residual = hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        key, value = self.self_attn.keys_and_values(hidden_states)
        if cache is not None:
            key, value = cache.write(self.index, key, value)
        hidden_states, attentions = self.self_attn(
            hidden_states,
            key,
            value,
            mask,
            is_causal=mask is None and bool(hidden_states.shape[1] > 1),  # Traced, a comparison is no bool.
            head_mask=head_mask,
            output_attentions=output_attentions,
        )
        hidden_states = residual + dropped(hidden_states, self.dropout, self.training)

        cross_attentions = None
        encoder = self._encoder_keys_and_values(cache, encoder_hidden_states)
        if encoder is not None:
            residual = hidden_states
            hidden_states, cross_attentions = self.encoder_attn(
                self.encoder_attn_layer_norm(hidden_states),
                *encoder,
                encoder_mask,
                head_mask=cross_attn_head_mask,
                output_attentions=output_attentions,
            )
            hidden_states = residual + dropped(hidden_states, self.dropout, self.training)

        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        hidden_states = self.fc2(dropped(hidden_states, self.activation_dropout, self.training))
        return residual + dropped(hidden_states, self.dropout, self.training), attentions, cross_attentions

    def _encoder_keys_and_values(self, cache: XGLMCache | None, states: torch.Tensor | None) -> KeyValue | None:
        """What cross-attention attends to: the cache's, or the encoder states'; None if there is neither."""
        if cache is not None and len(cache.encoder) > self.index:
            return cache.encoder[self.index]
        if states is None:
            return None
        key, value = self.encoder_attn.keys_and_values(states)
        if cache is not None:
            cache.write_encoder(key, value)
        return key, value
