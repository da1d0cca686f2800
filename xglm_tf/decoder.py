"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_core.inputs import check_attention_mask, check_input_ids, check_positions
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_tf.attention import TFXGLMAttention, attention_mask_for
from xglm_tf.cache import TFXGLMCache, extend_cache
from xglm_tf.pretrained import TFXGLMPreTrainedModel

ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": functools.partial(tf.nn.gelu, approximate=False),
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "gelu_new": functools.partial(tf.nn.gelu, approximate=True),
}


class TFXGLMSinusoidalPositionalEmbedding(keras.layers.Layer):
    """Looks up rows of the position table, which is always computed and always float32."""

    def __init__(self, config: XGLMConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        table = position_table(config)
        # Differs: compiled code cannot raise, so a position past the limit finds a row of NaN. Keras means something
        # else by `weights`, hence the name.
        self.table = tf.constant(np.concatenate([table, np.full_like(table[:1], np.nan)]))

    def call(self, position_ids: tf.Tensor) -> tf.Tensor:
        """float32 [batch, length, d_model] for positions [batch, length]; NaN past the limit."""
        return tf.gather(self.table, tf.minimum(position_ids + POSITION_OFFSET, len(self.table) - 1))


class TFXGLMDecoderLayer(keras.layers.Layer):
    """One pre-norm block: x + attention(norm(x)), then x + fc2(activation(fc1(norm(x))))."""

    def __init__(self, config: XGLMConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        activation, dtype = config.activation_function, self.dtype_policy
        self.config = config
        self.self_attn = TFXGLMAttention(config, dtype=dtype, name="self_attn")
        self.self_attn_layer_norm = _layer_norm("self_attn_layer_norm", dtype)
        self.activation_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.fc1 = keras.layers.Dense(config.ffn_dim, dtype=dtype, name="fc1")
        self.fc2 = keras.layers.Dense(config.d_model, dtype=dtype, name="fc2")
        self.final_layer_norm = _layer_norm("final_layer_norm", dtype)
        self.dropout = keras.layers.Dropout(config.dropout, dtype=dtype)
        self.activation_dropout = keras.layers.Dropout(config.activation_dropout, dtype=dtype)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        states = (None, None, self.config.d_model)
        self.self_attn.build(states)
        self.self_attn_layer_norm.build(states)
        self.fc1.build(states)
        self.fc2.build((None, None, self.config.ffn_dim))
        self.final_layer_norm.build(states)

    def call(
        self, hidden_states: tf.Tensor, mask: tf.Tensor, *, cache: TFXGLMCache | None, layer: int
    ) -> tuple[tf.Tensor, TFXGLMCache | None]:
        """[batch, length, d_model] -> the same, and the cache; see `TFXGLMAttention.call` for the other arguments."""
        residual = hidden_states
        hidden_states, cache = self.self_attn(self.self_attn_layer_norm(hidden_states), mask, cache=cache, layer=layer)
        hidden_states = residual + self.dropout(hidden_states)
        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        hidden_states = self.fc2(self.activation_dropout(hidden_states))
        return residual + self.dropout(hidden_states), cache


class TFXGLMMainLayer(keras.layers.Layer):
    """The decoder as a layer.

    Differs: `layers` means something else in a Keras model, and a model and its parts need one set of variable paths.
    """

    def __init__(self, config: XGLMConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.config = config
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = keras.layers.Embedding(config.vocab_size, config.d_model, dtype=dtype, name="embed_tokens")
        self.embed_positions = TFXGLMSinusoidalPositionalEmbedding(config, dtype="float32", name="embed_positions")
        self.dropout = keras.layers.Dropout(config.dropout, dtype=dtype)
        self.layers = [
            TFXGLMDecoderLayer(config, dtype=dtype, name=f"layers.{index}") for index in range(config.num_layers)
        ]
        self.layer_norm = _layer_norm("layer_norm", dtype)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables, in the order of the weights in a checkpoint."""
        self.embed_tokens.build()
        for layer in self.layers:
            layer.build()
        self.layer_norm.build((None, None, self.config.d_model))

    def call(
        self,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        *,
        past_key_values: TFXGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """See `TFXGLMModel.call`."""
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        batch, length = keras.ops.shape(input_ids)
        past = tf.constant(0) if past_key_values is None else past_key_values.length
        mask = _key_mask(attention_mask, past_key_values, batch, length)
        cache = None
        if use_cache or past_key_values is not None:
            cache = extend_cache(past_key_values, config, length, mask, self.compute_dtype)
            # An empty cache has no keys but the new ones to attend to.
            mask = cache.mask[:, :length] if cache.is_empty else cache.mask
        if position_ids is None:
            position_ids = _position_ids(mask, past, length)
        _check_values(input_ids, position_ids, config)

        # Scaled in float32: in bfloat16 the scale itself would be rounded, by up to 0.2%.
        hidden_states = tf.cast(self.embed_tokens(input_ids), tf.float32) * self.embed_scale
        positions = tf.cast(self.embed_positions(position_ids), self.compute_dtype)
        hidden_states = self.dropout(tf.cast(hidden_states, self.compute_dtype) + positions)
        if cache is not None and not tf.executing_eagerly():
            # Compiled code cannot raise, and would overwrite the last positions: NaN is better than wrong.
            hidden_states = tf.where(past + length <= cache.capacity, hidden_states, math.nan)
        attend = attention_mask_for(mask, past, length)
        all_states: list[tf.Tensor] = []
        for index, layer in enumerate(self.layers):
            all_states.append(hidden_states)
            hidden_states, cache = layer(hidden_states, attend, cache=cache, layer=index)
        if cache is not None:
            cache = dataclasses.replace(cache, length=past + length)
        hidden_states = self.layer_norm(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
        )


class TFXGLMModel(TFXGLMPreTrainedModel):
    """The bare decoder: token ids to hidden states.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.
        dtype: type of parameters and computation, by name or as a Keras policy.
        plan: the checkpoint to take the weights from instead.
    """

    has_head = False

    def __init__(self, config: XGLMConfig, *, dtype: Any = "float32", plan: LoadPlan | None = None) -> None:
        super().__init__(config, dtype=dtype)
        self.model = TFXGLMMainLayer(config, dtype=self.dtype_policy, name="model")
        self.create_weights(plan)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        self.model.build()

    def call(
        self,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        *,
        past_key_values: TFXGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        training: bool = False,
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
            training: whether dropout acts.

        Returns:
            The output, its states in the type of the computation.

        Raises:
            InputError: ids outside the vocabulary, a mask of another shape, or a position past the limit. Inside a
                `tf.function` nothing is checked: the result is NaN if a position is past the limit or the cache, which
                cannot grow there, is full.
        """
        return self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )


def _layer_norm(name: str, dtype: Any) -> keras.layers.LayerNormalization:
    return keras.layers.LayerNormalization(epsilon=LAYER_NORM_EPS, dtype=dtype, name=name)


def _key_mask(
    attention_mask: tf.Tensor | None, past: TFXGLMCache | None, batch: int | tf.Tensor, length: int | tf.Tensor
) -> tf.Tensor:
    """The mask over cached and new positions, bool [batch, at least past + length]."""
    if attention_mask is not None:
        if tf.executing_eagerly():
            check_attention_mask(attention_mask.shape, batch, 0 if past is None else int(past.length), length)
        return attention_mask != 0
    return tf.ones((batch, length), tf.bool) if past is None else past.mask


def _position_ids(mask: tf.Tensor, past: tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """Counts each row's tokens that are not padding: [batch, length]; padding repeats the position before it."""
    counts = tf.maximum(tf.cumsum(tf.cast(mask, tf.int32), axis=1) - 1, 0)
    # A slice would do, but XLA would compile it anew for each value of `past`.
    new = past + tf.range(length)
    return tf.gather(counts, tf.minimum(new, keras.ops.shape(mask)[1] - 1), axis=1)


def _check_values(input_ids: tf.Tensor, position_ids: tf.Tensor, config: XGLMConfig) -> None:
    """Checks ids and positions, unless they are being traced."""
    if tf.executing_eagerly():
        check_input_ids(input_ids.numpy(), config)
        check_positions(int(tf.reduce_min(position_ids)), int(tf.reduce_max(position_ids)), config)
