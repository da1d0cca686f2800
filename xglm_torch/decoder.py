"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_core.errors import InputError
from xglm_core.inputs import inputs_as_given
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_torch.attention import attention_mask_for
from xglm_torch.blocks import XGLMDecoderLayer
from xglm_torch.cache import XGLMCache, as_cache, extend_cache, is_foreign, update_foreign
from xglm_torch.dropout import dropped
from xglm_torch.inputs import as_tensor, check_arguments, check_position_ids, has_values
from xglm_torch.pretrained import XGLMPreTrainedModel
from xglm_torch.products import with_fast_gradients


class XGLMSinusoidalPositionalEmbedding(nn.Module):
    """Looks up rows of the position table, which is always computed and always float32."""

    weights: torch.Tensor

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weights", torch.from_numpy(position_table(config)), persistent=False)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """float32 [batch, length, d_model] for positions [batch, length]."""
        # A model made on the meta device has its table in memory, where loaded weights will follow.
        return self.weights.to(position_ids.device)[position_ids + POSITION_OFFSET]

    def _load_from_state_dict(self, *args: Any) -> None:
        """Does nothing with the table that some state dicts hold: it is computed."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves the table with the model, but keeps its type, and its values when the model is emptied (`to_empty`)."""
        device = fn(self.weights[:0]).device
        self.weights = torch.from_numpy(position_table(self.config)).to(device)
        return self


class XGLMScaledWordEmbedding(nn.Embedding):
    """Token embeddings times `embed_scale`: what `inputs_embeds` stands in for.

    It has no `padding_idx`, which would keep gradients from a row that may be in use: masks decide what is padding.

    Attributes:
        embed_scale: the factor; adapters on this layer apply it to what they add.
    """

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__(config.vocab_size, config.d_model)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, length, d_model] for ids [batch, length]."""
        return super().forward(input_ids) * self.embed_scale


class XGLMModel(XGLMPreTrainedModel):
    """The bare decoder: token ids to hidden states.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.
        embed_tokens: an embedding [vocab_size, d_model] whose weight this model shares; None makes one.

    Raises:
        InputError: `embed_tokens` has another shape.
    """

    has_head = False

    def __init__(self, config: XGLMConfig, embed_tokens: nn.Embedding | None = None) -> None:
        super().__init__(config)
        self.embed_tokens = XGLMScaledWordEmbedding(config)
        self.embed_positions = XGLMSinusoidalPositionalEmbedding(config)
        self.layers = nn.ModuleList(XGLMDecoderLayer(config, index) for index in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.init_weights()
        if embed_tokens is not None:
            self.set_input_embeddings(embed_tokens)

    @inputs_as_given(as_tensor)
    @with_fast_gradients
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """Runs the decoder.

        Args:
            input_ids: new tokens, integers [batch, length].
            attention_mask: 1 for tokens, 0 for padding [batch, past + length]; None means no (further) padding.
            position_ids: positions of the new tokens, integers [batch or 1, length]; None counts the tokens of each row
                that are not padding.
            encoder_hidden_states: what cross-attention attends to [batch, encoder length, d_model]; the cache keeps
                what it needs of them, and later calls need not give them again.
            encoder_attention_mask: 1 for encoder positions, 0 for padding [batch, encoder length]; None means no
                padding, or what the cache remembers.
            head_mask: factors of the attention probabilities [num_layers, attention_heads]: 0 switches a head off.
            cross_attn_head_mask: the same for cross-attention.
            past_key_values: the cache of an earlier call, or a tuple with (key, value) of each layer, each [batch,
                heads, past, head_dim], and then, if any, those of the encoder; it stays valid and unchanged. Or a cache
                of transformers, which gets the new positions, as it does there.
            inputs_embeds: embeddings instead of `input_ids` [batch, length, d_model], as `get_input_embeddings()` gives
                them: scaled, without positions.
            use_cache: whether to return a cache; None follows the configuration.
            output_attentions: whether to return attention probabilities; None follows the configuration.
            output_hidden_states: whether to return the input of each block and the final states; None follows the
                configuration.
            return_dict: whether to return an output object rather than a tuple; None follows the configuration.

        Returns:
            The output, its states in the parameters' type, or the tuple of its results that are not None.

        Raises:
            InputError: arguments are missing or contradict each other, have another shape, hold ids outside the
                vocabulary or a position past the limit.
        """
        config = self.config
        checkpointing = self.is_gradient_checkpointing and self.training
        uncached = (
            "gradient checkpointing" if checkpointing else "a model split among devices" if self._is_split() else ""
        )
        if uncached and use_cache:
            raise InputError(f"use_cache is True, but {uncached} keeps no cache; expected False or None")
        use_cache = (config.use_cache and not uncached) if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        given = past_key_values
        past_key_values = as_cache(given, config)
        past = 0 if past_key_values is None else past_key_values.length
        check_arguments(
            config,
            past_key_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            head_mask=head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            inputs_embeds=inputs_embeds,
        )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = hidden_states.shape
        mask = _key_mask(attention_mask, past_key_values, batch, length)
        if position_ids is None:
            position_ids = _position_ids(mask, past, length, hidden_states.device)
        check_position_ids(config, position_ids)

        hidden_states = hidden_states + self.embed_positions(position_ids).to(hidden_states.dtype)
        hidden_states = dropped(hidden_states, config.dropout, self.training)
        cache = None
        if use_cache or past_key_values is not None:
            cache = extend_cache(past_key_values, config, length, mask, hidden_states)
            if encoder_attention_mask is not None:
                cache.encoder_mask = encoder_attention_mask != 0
            encoder_attention_mask = cache.encoder_mask
        attend = attention_mask_for(mask, past, length, hidden_states.device)
        attend_encoder = None if encoder_attention_mask is None else (encoder_attention_mask != 0)[:, None, None, :]
        all_states: list[torch.Tensor] = []
        all_attentions: list[torch.Tensor] = []
        all_cross_attentions: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_states.append(hidden_states)
            is_first = index % self.gradient_checkpointing_every == 0
            block = functools.partial(self._checkpointed, layer) if checkpointing and is_first else layer
            new_states, attentions, cross_attentions = block(
                hidden_states,
                attend,
                cache,
                encoder_hidden_states,
                attend_encoder,
                None if head_mask is None else head_mask[index],
                None if cross_attn_head_mask is None else cross_attn_head_mask[index],
                output_attentions,
            )
            hidden_states = self._dropped(hidden_states, new_states)
            if attentions is not None:
                all_attentions.append(attentions)
            if cross_attentions is not None:
                all_cross_attentions.append(cross_attentions)
        if cache is not None and is_foreign(given):
            update_foreign(given, cache, past)
        hidden_states = self.layer_norm(hidden_states)
        outputs = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) or None,
            cross_attentions=tuple(all_cross_attentions) or None,
        )
        return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    def _is_split(self) -> bool:
        """Whether this process has some of the heads only; see `xglm_torch.parallel.split_layers`."""
        attention = self.layers.get_submodule("0.self_attn")
        return attention.heads != self.config.kept_heads(0)

    def _checkpointed(self, layer: nn.Module, *args: Any) -> Any:
        """Runs a block and computes it again in the backward pass, rather than keeping what is inside it."""
        pinned = args[0].device.type != "cpu"
        with save_on_cpu(pin_memory=pinned) if self.gradient_checkpointing_offload else contextlib.nullcontext():
            return checkpoint(with_fast_gradients(layer), *args, **self.gradient_checkpointing_kwargs)

    def _dropped(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """What follows a block: in training, with probability `config.layerdrop`, what came before it.

        The block runs in any case: so the cache has its keys, each parameter has a gradient, and no graph depends on
        chance.
        """
        if not self.training or self.config.layerdrop == 0:
            return after
        return torch.where(torch.rand((), device=after.device) < self.config.layerdrop, before, after)


def _key_mask(
    attention_mask: torch.Tensor | None, past: XGLMCache | None, batch: int, length: int
) -> torch.Tensor | None:
    """The mask over cached and new positions, bool [batch, past + length]; None if nothing is padding."""
    if attention_mask is not None:
        mask = attention_mask != 0
        # Without padding the fast kernels need no mask. Looking costs nothing on a CPU, but would stall a GPU.
        return None if has_values(mask) and mask.device.type == "cpu" and bool(mask.all()) else mask
    if past is None or past.mask is None:
        return None
    return torch.cat([past.mask, past.mask.new_ones(batch, length)], dim=1)


def _position_ids(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor:
    """Counts each row's tokens that are not padding: [batch or 1, length]; padding repeats the position before it."""
    if mask is None:
        return torch.arange(past, past + length, device=device)[None]
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
