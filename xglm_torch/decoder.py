"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xglm_core.calls import DecoderInputs, DecoderResults, Wanted, present, resolve
from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_core.inputs import inputs_as_given
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_torch.attention import attention_mask_for
from xglm_torch.blocks import XGLMDecoderLayer
from xglm_torch.cache import XGLMCache, as_cache, extend_cache
from xglm_torch.checkpointing import run_in_training
from xglm_torch.dropout import dropped
from xglm_torch.foreign_cache import update_foreign
from xglm_torch.inputs import as_tensor, check_arguments, with_inner_door
from xglm_torch.pretrained import XGLMPreTrainedModel
from xglm_torch.recording import is_watched


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

    The table may be int8, see `xglm_torch.int8`. It has no `padding_idx`, which would keep gradients from a row that
    may be in use: masks decide what is padding.

    Differs: Flax has `nn.Embed` here, and its decoder multiplies.

    Attributes:
        embed_scale: the factor; adapters on this layer apply it to what they add.
    """

    def __init__(self, config: XGLMConfig) -> None:
        # Zeros, as `XGLMPreTrainedModel.init_weights` draws; not on the meta device, see there.
        super().__init__(config.vocab_size, config.d_model, _weight=torch.zeros(config.vocab_size, config.d_model))
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.weight_scale: torch.Tensor | None
        self.register_buffer("weight_scale", None)  # That of each row, if the table is int8.

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, length, d_model] for ids [batch, length]."""
        rows = super().forward(input_ids)
        return (rows if self.weight_scale is None else rows * self.weight_scale[input_ids, 0, None]) * self.embed_scale


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

    @with_inner_door
    @inputs_as_given(as_tensor)
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
        encoder, masks = (encoder_hidden_states, encoder_attention_mask), (head_mask, cross_attn_head_mask)
        inputs = DecoderInputs(input_ids, attention_mask, position_ids, *encoder, *masks, inputs_embeds)
        cache = as_cache(past_key_values, self.config)
        check_arguments(self.config, inputs, cache)
        wanted = resolve(self.config, use_cache, output_attentions, output_hidden_states, uncached=self.uncached)
        results = results_by_name(self.decode(inputs, cache, wanted), wanted, past_key_values)
        return present(BaseModelOutputWithPastAndCrossAttentions, self.config, return_dict, **results)

    def decode(self, inputs: DecoderInputs, past: XGLMCache | None, wanted: Wanted) -> DecoderResults:
        """The inner door: runs the decoder on what was checked, or needs no check.

        It is called through this module's own call, `model(inputs, past, wanted)`.

        Args:
            inputs: what to read; tensors.
            past: a cache to go on from, which stays as it is; or None.
            wanted: what to return besides the states.

        Returns:
            The states, in the parameters' type, and what is wanted; a cache also if `past` was given.
        """
        states = self.embed_tokens(inputs.input_ids) if inputs.inputs_embeds is None else inputs.inputs_embeds
        batch, length, _ = states.shape
        start = 0 if past is None else past.length
        mask = key_mask(inputs.attention_mask, past, batch, length)
        given, device = inputs.position_ids, states.device
        positions = position_ids_for(mask, start, length, device) if given is None else given
        states = states + self.embed_positions(positions).to(states.dtype)
        if self.training:
            states = dropped(states, self.config.dropout)

        encoder_mask = None if inputs.encoder_attention_mask is None else inputs.encoder_attention_mask != 0
        if encoder_mask is None and past is not None:
            encoder_mask = past.encoder_mask
        is_cached = wanted.cache or past is not None
        cache = extend_cache(past, self.config, length, (mask, encoder_mask), states) if is_cached else None
        for_blocks = inputs._replace(
            input_ids=None,
            inputs_embeds=None,
            attention_mask=attention_mask_for(mask, start, length, device),
            encoder_attention_mask=None if encoder_mask is None else encoder_mask[:, None, None, :],
        )
        kept = []
        for layer in self.layers:
            block: Any = functools.partial(run_in_training, self, layer) if self.training else layer
            after, *weights = block(states, cache, for_blocks, wanted.attentions)
            kept.append((states if wanted.hidden_states else None, *weights))
            states = after
        states = self.layer_norm(states)
        all_states, attentions, cross_attentions = zip(*kept, strict=True)
        return DecoderResults(
            states,
            cache,
            (*all_states, states) if wanted.hidden_states else None,
            attentions if wanted.attentions else None,
            cross_attentions if cross_attentions[0] is not None else None,
        )


def key_mask(
    attention_mask: torch.Tensor | None, past: XGLMCache | None, batch: int, length: int
) -> torch.Tensor | None:
    """The mask over cached and new positions, bool [batch, past + length]; None if nothing is padding."""
    if attention_mask is not None:
        mask = attention_mask != 0
        # Without padding the fast kernels need no mask. Looking costs nothing on a CPU, but would stall a GPU.
        return None if mask.device.type == "cpu" and not is_watched() and bool(mask.all()) else mask
    if past is None or past.mask is None:
        return None
    return torch.cat([past.mask, past.mask.new_ones(batch, length)], dim=1)


def position_ids_for(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor:
    """Counts each row's tokens that are not padding: [batch or 1, length]; padding repeats the position before it."""
    if mask is None:
        return torch.arange(past, past + length, device=device)[None]
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]


def results_by_name(results: DecoderResults, wanted: Wanted, past_key_values: Any) -> dict[str, Any]:
    """What a public call presents of the results; `past_key_values` is what the call was given.

    Differs: TF and Flax do this in the public call.
    """
    update_foreign(past_key_values, results.past_key_values)
    cache = results.past_key_values if wanted.cache else None
    return dict(zip(results._fields, results, strict=True)) | {"past_key_values": cache}
