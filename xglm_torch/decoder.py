"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_core.inputs import check_attention_mask, check_input_ids, check_positions
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_torch.attention import XGLMAttention, attention_mask_for
from xglm_torch.cache import XGLMCache, extend_cache
from xglm_torch.pretrained import XGLMPreTrainedModel

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
}


class XGLMSinusoidalPositionalEmbedding(nn.Module):
    """Looks up rows of the position table, which is always computed and always float32."""

    weights: torch.Tensor

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weights", torch.from_numpy(position_table(config)), persistent=False)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """float32 [batch, length, d_model] for positions [batch, length]."""
        return self.weights[position_ids + POSITION_OFFSET]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves the table with the model, but keeps its type, and its values when the model is emptied (`to_empty`)."""
        device = fn(self.weights[:0]).device
        self.weights = torch.from_numpy(position_table(self.config)).to(device)
        return self


class XGLMDecoderLayer(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + fc2(activation(fc1(norm(x))))."""

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__()
        activation = config.activation_function
        self.self_attn = XGLMAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.activation_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, cache: XGLMCache | None, layer: int
    ) -> torch.Tensor:
        """[batch, length, d_model] -> the same; see `XGLMAttention.forward` for the other arguments."""
        residual = hidden_states
        hidden_states = self.self_attn(self.self_attn_layer_norm(hidden_states), mask, cache, layer)
        hidden_states = residual + F.dropout(hidden_states, self.dropout, self.training)
        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        hidden_states = self.fc2(F.dropout(hidden_states, self.activation_dropout, self.training))
        return residual + F.dropout(hidden_states, self.dropout, self.training)


class XGLMModel(XGLMPreTrainedModel):
    """The bare decoder: token ids to hidden states.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.
    """

    has_head = False

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__(config)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.embed_positions = XGLMSinusoidalPositionalEmbedding(config)
        self.layers = nn.ModuleList(XGLMDecoderLayer(config) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.init_weights()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        past_key_values: XGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Runs the decoder.

        Args:
            input_ids: new tokens, integers [batch, length].
            attention_mask: 1 for tokens, 0 for padding [batch, past + length]; None means no (further) padding.
            position_ids: positions of the new tokens, integers [batch, length]; None counts the tokens of each row that
                are not padding.
            past_key_values: the cache of an earlier call; it stays valid and unchanged.
            use_cache: whether to return a cache; None follows the configuration.
            output_hidden_states: whether to return the input of each block and the final states; None follows the
                configuration.

        Returns:
            The output, its states in the parameters' type.

        Raises:
            InputError: ids outside the vocabulary, a mask of another shape, or a position past the limit.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        batch, length = input_ids.shape
        past = 0 if past_key_values is None else past_key_values.length
        mask = _key_mask(attention_mask, past_key_values, batch, length)
        if position_ids is None:
            position_ids = _position_ids(mask, past, length, input_ids.device)
        _check_values(input_ids, position_ids, config)

        hidden_states = self.embed_tokens(input_ids) * self.embed_scale
        hidden_states = hidden_states + self.embed_positions(position_ids).to(hidden_states.dtype)
        hidden_states = F.dropout(hidden_states, config.dropout, self.training)
        cache = None
        if use_cache or past:
            cache = extend_cache(past_key_values, config, length, mask, hidden_states)
        attend = attention_mask_for(mask, past, length, input_ids.device)
        all_states: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            all_states.append(hidden_states)
            hidden_states = layer(hidden_states, attend, cache, index)
        hidden_states = self.layer_norm(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
        )


def _key_mask(
    attention_mask: torch.Tensor | None, past: XGLMCache | None, batch: int, length: int
) -> torch.Tensor | None:
    """The mask over cached and new positions, bool [batch, past + length]; None if nothing is padding."""
    past_length = 0 if past is None else past.length
    if attention_mask is not None:
        check_attention_mask(attention_mask.shape, batch, past_length, length)
        mask = attention_mask != 0
        # Without padding the fast kernels need no mask. Looking costs nothing on a CPU, but would stall a GPU.
        return None if _has_values(mask) and mask.device.type == "cpu" and bool(mask.all()) else mask
    if past is None or past.mask is None:
        return None
    return torch.cat([past.mask, past.mask.new_ones(batch, length)], dim=1)


def _position_ids(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor:
    """Counts each row's tokens that are not padding: [batch or 1, length]; padding repeats the position before it."""
    if mask is None:
        return torch.arange(past, past + length, device=device)[None]
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]


def _check_values(input_ids: torch.Tensor, position_ids: torch.Tensor, config: XGLMConfig) -> None:
    """Checks ids and positions, unless they are being traced."""
    if _has_values(input_ids):
        check_input_ids(input_ids.numpy(force=True), config)
        check_positions(int(position_ids.min()), int(position_ids.max()), config)


def _has_values(tensor: torch.Tensor) -> bool:
    return not (torch.compiler.is_compiling() or tensor.is_meta)
