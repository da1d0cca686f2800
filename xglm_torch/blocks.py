"""One block: self-attention, cross-attention, and a feed-forward layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_torch.attention import XGLMAttention
from xglm_torch.cache import KeyValue, XGLMCache
from xglm_torch.dropout import dropped
from xglm_torch.fast.linear import linear_layer

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
}


class BlockInputs(NamedTuple):
    """What all blocks of a call read besides the states.

    Differs: TF's blocks read `DecoderInputs` themselves.

    Attributes:
        mask: see `attention_mask_for`.
        encoder_hidden_states: [batch, encoder length, d_model], or None.
        encoder_mask: bool [batch, 1, 1, encoder length], True = attend; None = every position.
        head_mask, cross_attn_head_mask: [num_layers, config.attention_heads], or None.
        attentions: whether to return the probabilities of both attentions.
    """

    mask: torch.Tensor | None
    encoder_hidden_states: torch.Tensor | None
    encoder_mask: torch.Tensor | None
    head_mask: torch.Tensor | None
    cross_attn_head_mask: torch.Tensor | None
    attentions: bool


class XGLMDecoderLayer(nn.Module):
    """One pre-norm block: self-attention, attention to encoder states if there are any, and a feed-forward layer.

    Each is x + f(norm(x)); the last is fc2(activation(fc1(norm(x)))).
    """

    def __init__(self, config: XGLMConfig, index: int) -> None:
        super().__init__()
        activation = config.activation_function
        self.index = index
        self.self_attn = XGLMAttention(config, config.kept_heads(index), is_causal=True)
        self.has_cross_attention = config.add_cross_attention
        if self.has_cross_attention:
            self.encoder_attn = XGLMAttention(config, list(range(config.attention_heads)), is_causal=False)
            self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.activation_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.fc1 = linear_layer(config.d_model, config.ffn_dim)
        self.fc2 = linear_layer(config.ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def forward(
        self, hidden_states: torch.Tensor, cache: XGLMCache | None, inputs: BlockInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Runs the block.

        Args:
            hidden_states: [batch, length, d_model].
            cache: where the new keys and values go, and those of the encoder come from if it holds any; or None.
            inputs: what else it reads.

        Returns:
            [batch, length, d_model], and the probabilities of self-attention and cross-attention, or None.
        """
        states = self.self_attn_layer_norm(hidden_states)
        key, value = self.self_attn.keys_and_values(states)
        if cache is not None:
            key, value = cache.write(self.index, key, value)
        factors = None if inputs.head_mask is None else inputs.head_mask[self.index]
        states, attentions = self.self_attn(states, key, value, inputs.mask, factors, inputs.attentions)
        hidden_states = hidden_states + (dropped(states, self.dropout) if self.training else states)

        cross_attentions = encoder = None
        if self.has_cross_attention:
            encoder = self._encoder_keys_and_values(cache, inputs.encoder_hidden_states)
        if encoder is not None:
            states = self.encoder_attn_layer_norm(hidden_states)
            factors = None if inputs.cross_attn_head_mask is None else inputs.cross_attn_head_mask[self.index]
            states, cross_attentions = self.encoder_attn(
                states, *encoder, inputs.encoder_mask, factors, inputs.attentions
            )
            hidden_states = hidden_states + (dropped(states, self.dropout) if self.training else states)

        states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        states = self.fc2(dropped(states, self.activation_dropout) if self.training else states)
        states = dropped(states, self.dropout) if self.training else states
        return hidden_states + states, attentions, cross_attentions

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
