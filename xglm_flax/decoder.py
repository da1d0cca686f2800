"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.calls import DecoderInputs, DecoderResults, Wanted, present, resolve
from xglm_core.config import XGLMConfig
from xglm_core.inputs import inputs_as_given
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_flax.attention import attention_mask_for
from xglm_flax.blocks import BlockInputs, BlockResults, FlaxXGLMDecoderLayers, OwnInputs
from xglm_flax.cache import FlaxXGLMCache, Length, extend_cache
from xglm_flax.initialization import embedding_init
from xglm_flax.layers import FlaxXGLMLayerNorm
from xglm_flax.linen import FlaxXGLMLinenModule
from xglm_flax.pretrained import FlaxXGLMPreTrainedModel
from xglm_flax.weights import Params


class FlaxXGLMSinusoidalPositionalEmbedding(nn.Module):
    """Looks up rows of the position table, which is always computed and always float32.

    Differs: PyTorch and Keras keep the table beside the weights. Here it is a constant of the compiled code: one more
    copy for each compilation, which is less than 0.4% of the weights of any published size.
    """

    config: XGLMConfig

    def setup(self) -> None:
        """Computes the table."""
        self.weights = position_table(self.config)

    def __call__(self, position_ids: jax.Array) -> jax.Array:
        """float32 [batch, length, d_model] for positions [batch, length]; NaN past the limit, if that was traced."""
        return jnp.take(self.weights, position_ids + POSITION_OFFSET, axis=0, mode="fill", fill_value=jnp.nan)


class FlaxXGLMModule(FlaxXGLMLinenModule):
    """The bare decoder as a Linen module: what `FlaxXGLMModel` compiles. See `FlaxXGLMLinenModule`.

    Differs: in PyTorch and TF the model class is the module itself.
    """

    output_class = BaseModelOutputWithPastAndCrossAttentions

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
        self.layer_norm = FlaxXGLMLayerNorm(self.dtype, self.param_dtype)
        self.dropout = nn.Dropout(config.dropout)

    def decode(
        self, inputs: DecoderInputs, cache: FlaxXGLMCache | None, wanted: Wanted, *, deterministic: bool = True
    ) -> DecoderResults:
        """The inner door: runs the decoder on what was checked, or needs no check.

        Args:
            inputs: what to read; the mask may cover all positions that a cache has room for.
            cache: a cache to go on from, with room, which stays as it is; or None.
            wanted: what to return besides the states; static.
            deterministic: whether dropout is off; else there is a "dropout" key.

        Returns:
            The states, in the type of the computation, and what is wanted.
        """
        embeddings = inputs.inputs_embeds
        states = self.embed_tokens(inputs.input_ids) * self.embed_scale if embeddings is None else embeddings
        states = jnp.asarray(states, self.dtype)
        length, start = states.shape[1], 0 if cache is None else cache.length
        mask = key_mask(inputs.attention_mask, cache, states.shape[0], length)
        positions = position_ids_for(mask, start, length) if inputs.position_ids is None else inputs.position_ids
        states = states + self.embed_positions(positions).astype(states.dtype)
        states = self.dropout(states, deterministic)
        encoder_mask = inputs.encoder_attention_mask
        if cache is not None:
            encoder_mask = cache.encoder_mask if encoder_mask is None else encoder_mask
            # Compiled code cannot raise, and would overwrite the last positions: NaN is better than wrong.
            states = jnp.where(start + length <= cache.capacity, states, jnp.nan)
        encoder_mask = None if encoder_mask is None else encoder_mask.astype(bool)
        for_blocks = BlockInputs(
            attention_mask_for(mask, start, length),
            start,
            inputs.encoder_hidden_states,
            None if encoder_mask is None else encoder_mask[:, None, None],
            deterministic,
        )
        own = [_own_inputs(self.config, index, cache, inputs) for index in range(self.config.num_layers)]
        # A scan would stack all results, so those that are not wanted do not leave the blocks.
        fields = ("cached", "encoder") * wanted.cache + ("attentions", "cross_attentions") * wanted.attentions
        states, blocks = self.layers(states, own, for_blocks, fields + ("hidden_states",) * wanted.hidden_states)
        states = self.layer_norm(states)
        keys_and_values, encoder = _of_blocks(blocks, "cached"), _of_blocks(blocks, "encoder")
        new = extend_cache(cache, keys_and_values, encoder, mask, encoder_mask, length) if wanted.cache else None
        before = _of_blocks(blocks, "hidden_states")
        return DecoderResults(
            states,
            new,
            None if before is None else (*before, states),
            _of_blocks(blocks, "attentions"),
            _of_blocks(blocks, "cross_attentions"),
        )


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
        encoder, masks = (encoder_hidden_states, encoder_attention_mask), (head_mask, cross_attn_head_mask)
        inputs = DecoderInputs(input_ids, attention_mask, position_ids, *encoder, *masks, inputs_embeds)
        checked = self._checked_call(inputs, past_key_values, params, train, dropout_rng)
        wanted = resolve(self.config, use_cache, output_attentions, output_hidden_states)
        results = self._results(*checked, wanted=wanted, deterministic=not train)
        return present(BaseModelOutputWithPastAndCrossAttentions, self.config, return_dict, **results)


def key_mask(attention_mask: jax.Array | None, past: FlaxXGLMCache | None, batch: int, length: int) -> jax.Array | None:
    """The mask over the new positions, or over all that the cache has room for; None if nothing is padding.

    Positions after the new ones may be marked or not: none of the new ones sees them.
    """
    if past is None:
        return None if attention_mask is None else attention_mask.astype(bool)
    if attention_mask is not None:
        return jnp.pad(attention_mask.astype(bool), ((0, 0), (0, past.capacity - attention_mask.shape[1])))
    return jax.lax.dynamic_update_slice_in_dim(past.mask, jnp.ones((batch, length), bool), past.length, axis=1)


def position_ids_for(mask: jax.Array | None, start: Length, length: int) -> jax.Array:
    """Counts each row's tokens that are not padding: [batch or 1, length]; padding repeats the position before it."""
    if mask is None:
        return jnp.arange(length)[None]
    counts = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return jax.lax.dynamic_slice_in_dim(counts, start, length, axis=1)


def _own_inputs(config: XGLMConfig, index: int, cache: FlaxXGLMCache | None, inputs: DecoderInputs) -> OwnInputs:
    """What a block reads alone."""
    of_heads, of_cross = inputs.head_mask, inputs.cross_attn_head_mask
    return OwnInputs(
        None if cache is None else (cache.keys[index], cache.values[index]),
        cache.encoder[index] if cache is not None and cache.encoder else None,
        None if of_heads is None else of_heads[index, np.array(config.kept_heads(index))],
        None if of_cross is None else of_cross[index],
    )


def _of_blocks(results: list[BlockResults], name: str) -> Any:
    """A result of all blocks as a tuple, or None."""
    found = tuple(getattr(one, name) for one in results)
    return None if found[0] is None else found
