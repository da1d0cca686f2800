"""Multi-head attention: to the positions before, and to encoder states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from xglm_core.config import XGLMConfig


class TFXGLMAttention(keras.layers.Layer):
    """softmax(q k^T / sqrt(head_dim) + mask) v, with biased projections, softmax in float32.

    Args:
        config: the architecture.
        heads: which of its heads there are, by their original index.
        kwargs: see `keras.layers.Layer`.
    """

    def __init__(self, config: XGLMConfig, heads: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = len(heads) * config.head_dim
        self.config = config
        self.heads = list(heads)
        self.k_proj = keras.layers.Dense(width, dtype=self.dtype_policy, name="k_proj")
        self.v_proj = keras.layers.Dense(width, dtype=self.dtype_policy, name="v_proj")
        self.q_proj = keras.layers.Dense(width, dtype=self.dtype_policy, name="q_proj")
        self.out_proj = keras.layers.Dense(config.d_model, dtype=self.dtype_policy, name="out_proj")
        self.dropout = keras.layers.Dropout(config.attention_dropout, dtype=self.dtype_policy)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        width = len(self.heads) * self.config.head_dim
        for layer in self._flatten_layers(include_self=False, recursive=False):
            layer.build((None, None, width if layer is self.out_proj else self.config.d_model))

    def keys_and_values(self, states: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """[batch, length, d_model] -> what there is to attend to, each [batch, heads, length, head_dim]."""
        return self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))

    def call(
        self,
        hidden_states: tf.Tensor,
        key: tf.Tensor,
        value: tf.Tensor,
        mask: tf.Tensor | None,
        head_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Attends from each position to the keys.

        Args:
            hidden_states: [batch, length, d_model].
            key, value: [batch, heads, keys, head_dim].
            mask: bool [batch, 1, length or 1, keys], True = attend; None = every key.
            head_mask: factors of the heads' probabilities [config.attention_heads]; None = 1.

        Returns:
            [batch, length, d_model], and the probabilities [batch, heads, length, keys].
        """
        query = self._split_heads(self.q_proj(hidden_states) * self.config.head_dim**-0.5)
        # Differs: not fused as in PyTorch; the function of Keras is several times slower for one query on a CPU.
        weights = tf.cast(_probabilities(query, key, mask), value.dtype)
        context = tf.matmul(self.dropout(weights), value)
        if head_mask is not None:
            # The factor of a head's probabilities is one of its result, which is smaller.
            factors = tf.cast(tf.gather(head_mask, self.heads), value.dtype)[:, None, None]
            context, weights = context * factors, weights * factors
        batch, heads, length, head_dim = keras.ops.shape(context)
        context = tf.reshape(tf.transpose(context, (0, 2, 1, 3)), (batch, length, heads * head_dim))
        return self.out_proj(context), weights

    def _split_heads(self, states: tf.Tensor) -> tf.Tensor:
        """[batch, length, width] -> [batch, heads, length, head_dim]."""
        batch, length, _ = keras.ops.shape(states)
        states = tf.reshape(states, (batch, length, len(self.heads), self.config.head_dim))
        return tf.transpose(states, (0, 2, 1, 3))


def attention_mask_for(mask: tf.Tensor, past: tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """Which keys each new position sees: those up to itself that are not padding.

    Args:
        mask: bool [batch, keys], False for padding, and where the cache is not filled.
        past: cached positions, int32.
        length: new positions.

    Returns:
        bool [batch, 1, length, keys], True = attend.
    """
    # Differs: never None as in `xglm_torch.attention`: a cache of fixed capacity has keys that nothing may see yet.
    slots = tf.range(keras.ops.shape(mask)[1])
    causal = slots <= past + tf.range(length)[:, None]
    return causal & mask[:, None, None, :]


def _probabilities(query: tf.Tensor, key: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """float32 [batch, heads, length, keys], of a query that is scaled."""
    scores = tf.cast(tf.matmul(query, key, transpose_b=True), tf.float32)
    # Masked scores are finite, so that a row without any visible key is a mean of values rather than NaN.
    return tf.nn.softmax(scores if mask is None else tf.where(mask, scores, scores.dtype.min))
