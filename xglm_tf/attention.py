"""Multi-head self-attention."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from xglm_core.config import XGLMConfig
from xglm_tf.cache import TFXGLMCache

# Low enough that exp() of it is 0 beside any score; finite, so that a row in which it is everywhere stays finite.
_MASKED = -1e30


class TFXGLMAttention(keras.layers.Layer):
    """softmax(q k^T / sqrt(head_dim) + mask) v, with biased projections, softmax in float32."""

    def __init__(self, config: XGLMConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.k_proj = keras.layers.Dense(config.d_model, dtype=self.dtype_policy, name="k_proj")
        self.v_proj = keras.layers.Dense(config.d_model, dtype=self.dtype_policy, name="v_proj")
        self.q_proj = keras.layers.Dense(config.d_model, dtype=self.dtype_policy, name="q_proj")
        self.out_proj = keras.layers.Dense(config.d_model, dtype=self.dtype_policy, name="out_proj")
        self.dropout = keras.layers.Dropout(config.attention_dropout, dtype=self.dtype_policy)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        for projection in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            projection.build((None, None, self.config.d_model))

    def call(
        self, hidden_states: tf.Tensor, mask: tf.Tensor, *, cache: TFXGLMCache | None, layer: int
    ) -> tuple[tf.Tensor, TFXGLMCache | None]:
        """Attends from each new position to the cached and the new ones.

        Args:
            hidden_states: [batch, length, d_model].
            mask: bool [batch, 1, length, keys], True = attend; the keys are the new positions alone if the cache is
                empty, else all that it has room for.
            cache: where the new keys and values go, or None.
            layer: index of this block in the cache.

        Returns:
            [batch, length, d_model], and the cache with the new keys and values.
        """
        query = self._split_heads(self.q_proj(hidden_states) * self.config.head_dim**-0.5)
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states))
        if cache is not None:
            cache = cache.write(layer, key, value)
            if not cache.is_empty:
                key, value = cache.keys[layer], cache.values[layer]
        # Differs: written out, because Keras' fused attention is several times slower for one query on a CPU.
        scores = tf.cast(tf.matmul(query, key, transpose_b=True), tf.float32)
        weights = tf.nn.softmax(tf.where(mask, scores, _MASKED))
        context = tf.matmul(self.dropout(tf.cast(weights, value.dtype)), value)
        context = tf.transpose(context, (0, 2, 1, 3))
        return self.out_proj(tf.reshape(context, keras.ops.shape(hidden_states))), cache

    def _split_heads(self, states: tf.Tensor) -> tf.Tensor:
        """[batch, length, d_model] -> [batch, heads, length, head_dim]."""
        batch, length, _ = keras.ops.shape(states)
        states = tf.reshape(states, (batch, length, self.config.attention_heads, self.config.head_dim))
        return tf.transpose(states, (0, 2, 1, 3))


def attention_mask_for(mask: tf.Tensor, past: tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """Which keys each new position sees: those up to itself that are not padding.

    Args:
        mask: bool [batch, keys], False for padding; keys past the new positions may have any value.
        past: cached positions, int32.
        length: new positions.

    Returns:
        bool [batch, 1, length, keys], True = attend.
    """
    # Differs: always a tensor, because a cache of fixed capacity has keys that nothing may see yet.
    slots = tf.range(keras.ops.shape(mask)[1])
    causal = slots <= past + tf.range(length)[:, None]
    return causal & mask[:, None, None, :]
