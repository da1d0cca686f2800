"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_flax.attention import FlaxXGLMAttention, attention_mask_for, dense
from xglm_flax.cache import FlaxXGLMCache, extend_cache
from xglm_flax.inputs import prepared_inputs
from xglm_flax.pretrained import FlaxXGLMPreTrainedModel
from xglm_flax.weights import Params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
}


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


class FlaxXGLMDecoderLayer(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + fc2(activation(fc1(norm(x))))."""

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        activation = config.activation_function
        self.self_attn = FlaxXGLMAttention(config, self.dtype, self.param_dtype)
        self.self_attn_layer_norm = layer_norm(self.dtype, self.param_dtype)
        self.activation_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.fc1 = dense(config, config.ffn_dim, self.dtype, self.param_dtype)
        self.fc2 = dense(config, config.d_model, self.dtype, self.param_dtype)
        self.final_layer_norm = layer_norm(self.dtype, self.param_dtype)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def __call__(
        self,
        hidden_states: jax.Array,
        mask: jax.Array,
        cache: FlaxXGLMCache | None,
        layer: int,
        deterministic: bool = True,
    ) -> tuple[jax.Array, FlaxXGLMCache | None]:
        """[batch, length, d_model] -> the same; see `FlaxXGLMAttention.__call__` for the cache and the rest."""
        residual = hidden_states
        normed = self.self_attn_layer_norm(hidden_states)
        hidden_states, cache = self.self_attn(normed, mask, cache, layer, deterministic)
        hidden_states = residual + self.dropout(hidden_states, deterministic)
        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        hidden_states = self.fc2(self.activation_dropout(hidden_states, deterministic))
        return residual + self.dropout(hidden_states, deterministic), cache


class FlaxXGLMDecoderLayers(nn.Module):
    """The blocks. Differs: Linen would name the items of a list "layers_0"; published trees have layers/0."""

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        self.blocks = [
            FlaxXGLMDecoderLayer(self.config, self.dtype, self.param_dtype, name=str(index))
            for index in range(self.config.num_layers)
        ]

    def __call__(
        self, hidden_states: jax.Array, mask: jax.Array, cache: FlaxXGLMCache | None, deterministic: bool = True
    ) -> tuple[list[jax.Array], FlaxXGLMCache | None]:
        """The input of the first block and the output of each, [batch, length, d_model], and the written cache."""
        states = [hidden_states]
        for index, block in enumerate(self.blocks):
            hidden_states, cache = block(hidden_states, mask, cache, index, deterministic)
            states.append(hidden_states)
        return states, cache


class FlaxXGLMModule(nn.Module):
    """The bare decoder as a Linen module: what `FlaxXGLMModel` compiles.

    Attributes:
        config: the architecture.
        dtype: type of the computation.
        param_dtype: type of the parameters.
    """

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=functools.partial(_embedding_init, config),
        )
        self.embed_positions = FlaxXGLMSinusoidalPositionalEmbedding(config)
        self.layers = FlaxXGLMDecoderLayers(config, self.dtype, self.param_dtype)
        self.layer_norm = layer_norm(self.dtype, self.param_dtype)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: FlaxXGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        deterministic: bool = True,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Runs the decoder on traced values: nothing is checked, and a cache has to have room; see `FlaxXGLMModel`.

        Args:
            input_ids, position_ids, use_cache, output_hidden_states: see `FlaxXGLMModel.__call__`.
            attention_mask: as there, or for all positions that `past_key_values` has room for.
            past_key_values: the cache of an earlier call.
            deterministic: whether dropout is off.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        batch, length = input_ids.shape
        past = 0 if past_key_values is None else past_key_values.length
        mask = _key_mask(attention_mask, past_key_values, batch, length)
        if position_ids is None:
            position_ids = _position_ids(mask, past, length)

        hidden_states = self.embed_tokens(input_ids) * self.embed_scale
        hidden_states = hidden_states + self.embed_positions(position_ids).astype(hidden_states.dtype)
        hidden_states = self.dropout(hidden_states, deterministic)
        cache = None
        if use_cache or past_key_values is not None:
            cache = extend_cache(past_key_values, config, length, mask, hidden_states)
            # Compiled code cannot raise, and would overwrite the last positions: NaN is better than wrong.
            hidden_states = jnp.where(past + length <= cache.capacity, hidden_states, jnp.nan)
        states, cache = self.layers(hidden_states, attention_mask_for(mask, past, length), cache, deterministic)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        hidden_states = self.layer_norm(states[-1])
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states[:-1], hidden_states) if output_hidden_states else None,
        )


class FlaxXGLMModel(FlaxXGLMPreTrainedModel):
    """The bare decoder: token ids to hidden states. See `FlaxXGLMPreTrainedModel` for the arguments.

    It may be called inside `jax.jit`, `jax.grad` and `jax.vmap`; what is traced there has no values to check.
    """

    has_head = False
    module_class = FlaxXGLMModule

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        past_key_values: FlaxXGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Runs the decoder.

        Args:
            input_ids: new tokens, integers [batch, length].
            attention_mask: 1 for tokens, 0 for padding [batch, past + length]; None means no (further) padding. With a
                cache whose length is traced, it covers all positions that there is room for: [batch, capacity].
            position_ids: positions of the new tokens, integers [batch, length]; None counts the tokens of each row that
                are not padding.
            past_key_values: the cache of an earlier call, or of `init_cache`; it stays valid and unchanged.
            use_cache: whether to return a cache; None follows the configuration.
            output_hidden_states: whether to return the input of each block and the final states; None follows the
                configuration.
            params: the parameters; None means the model's.
            dropout_rng: a key of `jax.random`, needed to train with dropout.
            train: whether dropout acts.

        Returns:
            The output, its states in the type of the computation.

        Raises:
            InputError: ids outside the vocabulary, a mask of another shape, a position past the limit, more tokens than
                the cache has room for, no parameters, or no `dropout_rng`.
        """
        return self._apply(
            self._params_or_own(params),
            *prepared_inputs(self.config, input_ids, attention_mask, position_ids, past_key_values),
            dropout_rng=dropout_rng,
            train=train,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )


jax.tree_util.register_dataclass(
    BaseModelOutputWithPastAndCrossAttentions,
    data_fields=[field.name for field in dataclasses.fields(BaseModelOutputWithPastAndCrossAttentions)],
    meta_fields=[],
)


def layer_norm(dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    """The norm of all blocks. Differs: Flax's default variance, E[x^2] - E[x]^2, cancels digits."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False)


def _embedding_init(config: XGLMConfig, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    weight = nn.initializers.normal(config.init_std)(key, shape, dtype)
    return weight if config.pad_token_id is None else weight.at[config.pad_token_id].set(0)


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


def _position_ids(mask: jax.Array | None, past: jax.Array | int, length: int) -> jax.Array:
    """Counts each row's tokens that are not padding: [batch or 1, length]; padding repeats the position before it."""
    if mask is None:
        return jnp.arange(length)[None]
    counts = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return jax.lax.dynamic_slice_in_dim(counts, past, length, axis=1)
