"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.config import XGLMConfig
from xglm_core.inputs import inputs_as_given
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_flax.attention import attention_mask_for
from xglm_flax.blocks import BlockInputs, FlaxXGLMDecoderLayers, Remat, layer_norm
from xglm_flax.cache import ByLayer, FlaxXGLMCache, Length, extend_cache
from xglm_flax.dropout import FlaxXGLMDropout
from xglm_flax.initialization import embedding_init
from xglm_flax.pretrained import FlaxXGLMPreTrainedModel
from xglm_flax.weights import Params


class FlaxXGLMSinusoidalPositionalEmbedding(nn.Module):
    """Looks up rows of the position table, which is always computed and always float32.

    Differs: the table is a constant of the compiled code. That costs one more copy per compilation, less than 0.4% of
    the weights of any published size, and keeps it out of the parameters.
    """

    config: XGLMConfig

    def setup(self) -> None:
        """Computes the table."""
        self.weights = position_table(self.config)

    def __call__(self, position_ids: jax.Array) -> jax.Array:
        """float32 [batch, length, d_model] for positions [batch, length]; NaN past the limit, if that was traced."""
        return jnp.take(self.weights, position_ids + POSITION_OFFSET, axis=0, mode="fill", fill_value=jnp.nan)


class FlaxXGLMModule(nn.Module):
    """The bare decoder as a Linen module: what `FlaxXGLMModel` compiles.

    Attributes:
        config: the architecture.
        dtype: type of the computation.
        param_dtype: type of the parameters.
        scan_layers: whether the blocks run in a `jax.lax.scan`; then the parameters may be those of `stack_layers`.
        remat: what the backward pass computes again; see `remat_policy`.
    """

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = "none"

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=embedding_init(config),
        )
        self.embed_positions = FlaxXGLMSinusoidalPositionalEmbedding(config)
        self.layers = FlaxXGLMDecoderLayers(config, self.dtype, self.param_dtype, self.scan_layers, self.remat)
        self.layer_norm = layer_norm(self.dtype, self.param_dtype)
        self.dropout = FlaxXGLMDropout(config.dropout)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        encoder_attention_mask: jax.Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
        past_key_values: FlaxXGLMCache | None = None,
        *,
        head_mask: jax.Array | None = None,
        cross_attn_head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """Runs the decoder on traced values: nothing is checked, and a cache has to have room; see `FlaxXGLMModel`.

        Args:
            input_ids, position_ids, encoder_hidden_states, encoder_attention_mask, output_attentions,
                output_hidden_states, return_dict, head_mask, cross_attn_head_mask, inputs_embeds, use_cache: see
                `FlaxXGLMModel.__call__`.
            attention_mask: as there, or for all positions that `past_key_values` has room for.
            deterministic: whether dropout is off.
            past_key_values: the cache of an earlier call.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if inputs_embeds is None:
            hidden_states = self.embed_tokens(input_ids) * self.embed_scale
        else:
            hidden_states = jnp.asarray(inputs_embeds, self.dtype)
        batch, length, _ = hidden_states.shape
        past = 0 if past_key_values is None else past_key_values.length
        mask = _key_mask(attention_mask, past_key_values, batch, length)
        if position_ids is None:
            position_ids = _position_ids(mask, past, length)

        hidden_states = hidden_states + self.embed_positions(position_ids).astype(hidden_states.dtype)
        hidden_states = self.dropout(hidden_states, deterministic)
        own = BlockInputs(
            head_mask=_of_kept_heads(head_mask, config),
            cross_attn_head_mask=cross_attn_head_mask,
        )
        cache = None
        if use_cache or past_key_values is not None:
            cache = extend_cache(past_key_values, config, length, mask, hidden_states, stacked=self.scan_layers)
            if encoder_attention_mask is not None:
                cache = dataclasses.replace(cache, encoder_mask=encoder_attention_mask.astype(bool))
            encoder_attention_mask = cache.encoder_mask
            if past_key_values is not None:
                own = own._replace(keys=cache.keys, values=cache.values)
            if cache.encoder:
                keys, values = zip(*cache.encoder, strict=True)
                own = own._replace(encoder_keys=keys, encoder_values=values)
            # Compiled code cannot raise, and would overwrite the last positions: NaN is better than wrong.
            hidden_states = jnp.where(past + length <= cache.capacity, hidden_states, jnp.nan)
        hidden_states, results = self.layers(
            hidden_states,
            attention_mask_for(mask, past, length),
            own,
            wanted=_wanted_fields(cache is not None, output_attentions, output_hidden_states),
            past=past,
            encoder_hidden_states=encoder_hidden_states,
            encoder_mask=None if encoder_attention_mask is None else encoder_attention_mask.astype(bool)[:, None, None],
            output_attentions=output_attentions,
            deterministic=deterministic,
        )
        hidden_states = self.layer_norm(hidden_states)
        if cache is not None:
            cache = cache.written(results.keys, results.values, length)
            if results.encoder_keys is not None:
                encoder = tuple(zip(results.encoder_keys, results.encoder_values, strict=True))
                cache = dataclasses.replace(cache, encoder=encoder)
        outputs = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=(*results.hidden_states, hidden_states) if output_hidden_states else None,
            attentions=_as_tuple(results.attentions),
            cross_attentions=_as_tuple(results.cross_attentions),
        )
        return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


class FlaxXGLMModel(FlaxXGLMPreTrainedModel):
    """The bare decoder: token ids to hidden states. See `FlaxXGLMPreTrainedModel` for the arguments.

    It may be called inside `jax.jit`, `jax.grad` and `jax.vmap`; what is traced there has no values to check.
    """

    has_head = False
    module_class = FlaxXGLMModule

    @inputs_as_given()
    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        encoder_attention_mask: jax.Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
        params: Params | None = None,
        past_key_values: Any = None,
        dropout_rng: jax.Array | None = None,
        *,
        head_mask: jax.Array | None = None,
        cross_attn_head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """Runs the decoder.

        Args:
            input_ids: new tokens, integers [batch, length].
            attention_mask: 1 for tokens, 0 for padding [batch, past + length]; None means no (further) padding. With a
                cache of `init_cache` it may cover all positions that there is room for, [batch, max_length], and with
                a cache whose length is traced it has to.
            position_ids: positions of the new tokens, integers [batch or 1, length]; None counts the tokens of each row
                that are not padding.
            encoder_hidden_states: what cross-attention attends to [batch, encoder length, d_model]; the cache keeps
                what it needs of them, and later calls need not give them again.
            encoder_attention_mask: 1 for encoder positions, 0 for padding [batch, encoder length]; None means no
                padding, or what the cache remembers.
            output_attentions: whether to return attention probabilities; None follows the configuration. With a cache
                whose length is traced, they are over all that it has room for.
            output_hidden_states: whether to return the input of each block and the final states; None follows the
                configuration.
            return_dict: whether to return an output object rather than a tuple; None follows the configuration.
            train: whether dropout acts.
            params: the parameters; None means the model's.
            past_key_values: the cache of an earlier call, or of `init_cache`, or a tuple with (key, value) of each
                layer, each [batch, heads, past, head_dim], and then, if any, those of the encoder; it stays valid and
                unchanged.
            dropout_rng: a key of `jax.random`, needed to train with dropout.
            head_mask: factors of the attention probabilities [num_layers, attention_heads]: 0 switches a head off.
            cross_attn_head_mask: the same for cross-attention.
            inputs_embeds: embeddings instead of `input_ids` [batch, length, d_model]: rows of `get_input_embeddings()`,
                times sqrt(d_model) if `config.scale_embedding`, without positions.
            use_cache: whether to return a cache; None follows the configuration.

        Returns:
            The output, its states in the type of the computation, or the tuple of its results that are not None.

        Raises:
            InputError: arguments are missing or contradict each other, have another shape, hold ids outside the
                vocabulary or a position past the limit; there are more tokens than the cache has room for, no
                parameters, or no `dropout_rng`.
        """
        return self._call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            train=train,
            params=params,
            past_key_values=past_key_values,
            dropout_rng=dropout_rng,
            head_mask=head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            static={},
        )


def _wanted_fields(cache: bool, attentions: bool, hidden_states: bool) -> tuple[str, ...]:
    """The fields of `BlockResults` to keep: a scan would stack the others, too."""
    return (
        *(("keys", "values", "encoder_keys", "encoder_values") if cache else ()),
        *(("attentions", "cross_attentions") if attentions else ()),
        *(("hidden_states",) if hidden_states else ()),
    )


def _as_tuple(items: ByLayer | None) -> tuple[jax.Array, ...] | None:
    return None if items is None else tuple(items)


def _of_kept_heads(head_mask: jax.Array | None, config: XGLMConfig) -> ByLayer | None:
    """The factors of the heads that each block has."""
    if head_mask is None or not config.pruned_heads:
        return head_mask
    return tuple(head_mask[index, np.array(config.kept_heads(index))] for index in range(config.num_layers))


def _key_mask(
    attention_mask: jax.Array | None, past: FlaxXGLMCache | None, batch: int, length: int
) -> jax.Array | None:
    """The mask over the new positions, or over all that the cache has room for; None if nothing is padding.

    Positions after the new ones may be marked or not: none of the new ones sees them.
    """
    if past is None:
        return None if attention_mask is None else attention_mask.astype(bool)
    if attention_mask is not None:
        return jnp.pad(attention_mask.astype(bool), ((0, 0), (0, past.capacity - attention_mask.shape[1])))
    return jax.lax.dynamic_update_slice_in_dim(past.mask, jnp.ones((batch, length), bool), past.length, axis=1)


def _position_ids(mask: jax.Array | None, past: Length, length: int) -> jax.Array:
    """Counts each row's tokens that are not padding: [batch or 1, length]; padding repeats the position before it."""
    if mask is None:
        return jnp.arange(length)[None]
    counts = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return jax.lax.dynamic_slice_in_dim(counts, past, length, axis=1)
