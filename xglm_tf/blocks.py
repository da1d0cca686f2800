"""One block: self-attention, cross-attention, and a feed-forward layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from xglm_core.calls import DecoderInputs
from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_tf.attention import TFXGLMAttention
from xglm_tf.cache import write

ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": functools.partial(tf.nn.gelu, approximate=False),
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "gelu_new": functools.partial(tf.nn.gelu, approximate=True),
}


class TFXGLMDecoderLayer(keras.layers.Layer):
    """One pre-norm block: self-attention, attention to encoder states if there are any, and a feed-forward layer.

    Each is x + f(norm(x)); the last is fc2(activation(fc1(norm(x)))).
    """

    def __init__(self, config: XGLMConfig, index: int, **kwargs: Any) -> None:
        super().__init__(name=f"layers.{index}", **kwargs)
        activation, dtype = config.activation_function, self.dtype_policy
        self.config = config
        self.index = index
        self.self_attn = TFXGLMAttention(config, config.kept_heads(index), dtype=dtype, name="self_attn")
        if config.add_cross_attention:
            every = range(config.attention_heads)
            self.encoder_attn = TFXGLMAttention(config, every, dtype=dtype, name="encoder_attn")
            self.encoder_attn_layer_norm = layer_norm("encoder_attn_layer_norm", dtype)
        self.self_attn_layer_norm = layer_norm("self_attn_layer_norm", dtype)
        self.activation_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.fc1 = keras.layers.Dense(config.ffn_dim, dtype=dtype, name="fc1")
        self.fc2 = keras.layers.Dense(config.d_model, dtype=dtype, name="fc2")
        self.final_layer_norm = layer_norm("final_layer_norm", dtype)
        self.dropout = keras.layers.Dropout(config.dropout, dtype=dtype)
        self.activation_dropout = keras.layers.Dropout(config.activation_dropout, dtype=dtype)

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """What `summary` shows: that of the states."""
        return None, None, self.config.d_model

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        for layer in self._flatten_layers(include_self=False, recursive=False):
            layer.build((None, None, self.config.ffn_dim if layer is self.fc2 else self.config.d_model))

    def call(
        self, hidden_states: tf.Tensor, inputs: DecoderInputs, past: tuple[tf.Tensor, ...] = (), start: Any = None
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...], tf.Tensor, tf.Tensor | None]:
        """Runs the block.

        Differs: it takes its own part of a cache, and returns the new part, where `XGLMDecoderLayer` in PyTorch writes
        into the cache: tensors cannot be written, and Keras walks through all arguments of each layer, which would take
        long for a whole cache.

        Args:
            hidden_states: [batch, length, d_model].
            inputs: those of the decoder, but for the masks: `attention_mask` as `attention_mask_for` makes it, over the
                new positions alone if the cache is empty, else over all that it has room for; `encoder_attention_mask`
                bool [batch, 1, 1, encoder length], True = attend.
            past: this block's of `TFXGLMCache.layers`; empty without a cache.
            start: how many positions it holds, int32.

        Returns:
            [batch, length, d_model]; `past` with the new keys and values, and with those of the encoder if there are
            any; the probabilities of self-attention and cross-attention, the latter None without an encoder.
        """
        residual = hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        key, value = self.self_attn.keys_and_values(hidden_states)
        present: tuple[tf.Tensor, ...] = ()
        if past:
            present = write(past[0], key, start), write(past[1], value, start)
            if tf.get_static_value(start) != 0:  # An empty cache has no keys but the new ones to attend to.
                key, value = present
        head_mask = None if inputs.head_mask is None else inputs.head_mask[self.index]
        hidden_states, attentions = self.self_attn(hidden_states, key, value, inputs.attention_mask, head_mask)
        hidden_states = residual + self.dropout(hidden_states)

        encoder, cross_attentions = past[2:], None
        if not encoder and inputs.encoder_hidden_states is not None:
            encoder = self.encoder_attn.keys_and_values(inputs.encoder_hidden_states)
        if encoder:
            residual = hidden_states
            hidden_states = self.encoder_attn_layer_norm(hidden_states)
            head_mask = None if inputs.cross_attn_head_mask is None else inputs.cross_attn_head_mask[self.index]
            hidden_states, cross_attentions = self.encoder_attn(
                hidden_states, *encoder, inputs.encoder_attention_mask, head_mask
            )
            hidden_states = residual + self.dropout(hidden_states)

        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        hidden_states = self.fc2(self.activation_dropout(hidden_states))
        return residual + self.dropout(hidden_states), (*present, *encoder), attentions, cross_attentions


def layer_norm(name: str, dtype: Any) -> keras.layers.LayerNormalization:
    """The norm of all blocks, which computes in float32.

    Differs: PyTorch has `nn.LayerNorm` here, and Flax `FlaxXGLMLayerNorm`.
    """
    return keras.layers.LayerNormalization(epsilon=LAYER_NORM_EPS, dtype=dtype, name=name)
