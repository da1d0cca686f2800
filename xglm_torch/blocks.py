"""One block: self-attention, cross-attention, and a feed-forward layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.calls import DecoderInputs
from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_torch.attention import XGLMAttention
from xglm_torch.cache import XGLMCache
from xglm_torch.dropout import dropped
from xglm_torch.fast.linear import linear_layer

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
        self.self_attn = XGLMAttention(config, config.kept_heads(index), is_causal=True)
        if config.add_cross_attention:
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
        self, hidden_states: torch.Tensor, cache: XGLMCache | None, inputs: DecoderInputs, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Runs the block.

        Args:
            hidden_states: [batch, length, d_model].
            cache: where the new keys and values go, and those of the encoder come from if it holds any; or None.
            inputs: those of the decoder without the tokens, and with masks that are bool, True = attend:
                `attention_mask` as `attention_mask_for` makes it, `encoder_attention_mask` [batch, 1, 1, encoder
                length].
            output_attentions: whether to return the probabilities.

        Returns:
            [batch, length, d_model], and the probabilities of self-attention and cross-attention, or None.
        """
        states = self.self_attn_layer_norm(hidden_states)
        key, value = self.self_attn.keys_and_values(states)
        if cache is not None:
            key, value = cache.write(self.index, key, value)
        factors = None if inputs.head_mask is None else inputs.head_mask[self.index]
        states, attentions = self.self_attn(states, key, value, inputs.attention_mask, factors, output_attentions)
        hidden_states = hidden_states + (dropped(states, self.dropout) if self.training else states)

        encoder: tuple[torch.Tensor, ...] = () if cache is None else cache.encoder[self.index]
        if not encoder and inputs.encoder_hidden_states is not None:
            encoder = self.encoder_attn.keys_and_values(inputs.encoder_hidden_states)
            if cache is not None:
                cache.write_encoder(self.index, *encoder)
        cross_attentions = None
        if encoder:
            states = self.encoder_attn_layer_norm(hidden_states)
            factors = None if inputs.cross_attn_head_mask is None else inputs.cross_attn_head_mask[self.index]
            masks = inputs.encoder_attention_mask, factors
            states, cross_attentions = self.encoder_attn(states, *encoder, *masks, output_attentions)
            hidden_states = hidden_states + (dropped(states, self.dropout) if self.training else states)

        states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        states = self.fc2(dropped(states, self.activation_dropout) if self.training else states)
        states = dropped(states, self.dropout) if self.training else states
        return hidden_states + states, attentions, cross_attentions
