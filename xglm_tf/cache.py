"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Its shapes do not depend on how much it holds, so that compiled code serves any number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras
import tensorflow as tf

from xglm_core.config import XGLMConfig

_BLOCK = 64  # Positions by which storage grows, so that shapes rarely change from one token to the next.


# Differs: no storage is shared. Tensors cannot be written in place, except by XLA, which sees that the old one is done.
@dataclasses.dataclass(frozen=True, eq=False)
class TFXGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        keys: per layer [batch, heads, capacity, head_dim].
        values: the same.
        mask: bool [batch, capacity], False for padding; True where nothing is held yet.
        length: positions held, int32 scalar.
    """

    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]
    mask: tf.Tensor
    length: tf.Tensor

    @property
    def is_empty(self) -> bool:
        """Whether it is known, even while tracing, that nothing is held."""
        return tf.get_static_value(self.length) == 0

    @property
    def capacity(self) -> int | tf.Tensor:
        """Positions that there is room for."""
        return keras.ops.shape(self.mask)[1]

    def write(self, layer: int, key: tf.Tensor, value: tf.Tensor) -> TFXGLMCache:
        """This cache with a layer's new keys and values, each [batch, heads, new, head_dim], after the older ones."""
        keys, values = list(self.keys), list(self.values)
        written = _written if tf.executing_eagerly() else _written_traced
        keys[layer] = written(keys[layer], key, self.length)
        values[layer] = written(values[layer], value, self.length)
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Key and value of a layer, each [batch, heads, length, head_dim]."""
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def __iter__(self) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        return (self[layer] for layer in range(len(self)))

    # TensorFlow's protocol for classes that its functions and loops may take and return.
    def __tf_flatten__(self) -> tuple[tuple[()], tuple[Any, ...]]:
        return (), (self.keys, self.values, self.mask, self.length)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[()], components: tuple[Any, ...]) -> Self:
        return cls(*components)


def empty_cache(config: XGLMConfig, batch: int | tf.Tensor, capacity: int | tf.Tensor, dtype: str) -> TFXGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions."""
    storage = tf.zeros((batch, config.attention_heads, capacity, config.head_dim), dtype)
    layers = (storage,) * config.num_layers
    return TFXGLMCache(layers, layers, tf.ones((batch, capacity), tf.bool), tf.constant(0))


def extend_cache(
    past: TFXGLMCache | None, config: XGLMConfig, new: int | tf.Tensor, mask: tf.Tensor, dtype: str
) -> TFXGLMCache:
    """The cache for `new` positions after `past`, to be filled by `TFXGLMCache.write` layer by layer.

    Its length is still that of `past`. While tracing, `past` keeps its capacity, and the positions must fit.

    Args:
        past: what was read before, or None; it stays valid and unchanged.
        config: the model's configuration.
        new: positions to add.
        mask: bool [batch, at least past + new and at most the capacity], False for padding.
        dtype: type of keys and values.
    """
    if past is None:
        past = empty_cache(config, keras.ops.shape(mask)[0], _rounded_up(new), dtype)
    elif tf.executing_eagerly():
        past = with_capacity(past, max(past.capacity, _rounded_up(int(past.length) + new)))
    unused = past.capacity - keras.ops.shape(mask)[1]
    return dataclasses.replace(past, mask=tf.pad(mask, ((0, 0), (0, unused)), constant_values=True))


def with_capacity(cache: TFXGLMCache, capacity: int) -> TFXGLMCache:
    """The cache with room for `capacity` positions, not fewer than now; itself if it has that."""
    more = capacity - cache.capacity
    if more == 0:
        return cache
    return dataclasses.replace(
        cache,
        keys=tuple(tf.pad(storage, ((0, 0), (0, 0), (0, more), (0, 0))) for storage in cache.keys),
        values=tuple(tf.pad(storage, ((0, 0), (0, 0), (0, more), (0, 0))) for storage in cache.values),
        mask=tf.pad(cache.mask, ((0, 0), (0, more)), constant_values=True),
    )


@tf.custom_gradient
def _written(storage: tf.Tensor, new: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
    """`storage` with `new` from position `start` on; gradients flow through the new positions only."""

    def gradient(upstream: tf.Tensor) -> tuple[None, tf.Tensor, None]:
        return None, tf.gather(upstream, start + tf.range(tf.shape(new)[2]), axis=2), None

    return keras.ops.slice_update(storage, (0, 0, start, 0), new), gradient


# TensorFlow never forgets a graph in which it met a custom gradient. Here it meets a small one: the caller's would keep
# all weights in memory after the model is gone.
_written_traced = tf.function(_written, autograph=False)


def _rounded_up(positions: int | tf.Tensor) -> int | tf.Tensor:
    return -(-positions // _BLOCK) * _BLOCK
