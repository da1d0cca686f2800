"""Dropout."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from xglm_core.dropout import drop_level

_BITS_TYPE = tf.uint16  # Of as many bits as `xglm_core.dropout.BITS`.


class TFXGLMDropout(keras.layers.Dropout):
    """Dropout, as Keras' layer, which draws 32 bits for each element.

    Args:
        rate: drop probability in [0, 1]; see `drop_level`.
        kwargs: see `keras.layers.Dropout`.
    """

    def call(self, states: tf.Tensor, training: Any = False) -> tf.Tensor:
        """Drops elements of [..., width], if `training`."""
        level, factor = drop_level(self.rate)
        if not training or not level:
            return states
        *others, width = keras.ops.shape(states)
        half = -(-width // 2)
        seed = tf.cast(self.seed_generator.next(), tf.int32)
        bits32 = tf.random.stateless_uniform((*others, half), seed, minval=None, maxval=None, dtype=tf.uint32)
        # Differs: both halves of 32 bits lie side by side, which is twice as fast here as the order in Flax.
        bits = tf.reshape(tf.bitcast(bits32, _BITS_TYPE), (*others, 2 * half))[..., :width]
        kept = bits > tf.constant(level - 1, _BITS_TYPE)  # The level itself may be 2**16.
        return tf.where(kept, states * tf.cast(factor, states.dtype), tf.zeros((), states.dtype))
