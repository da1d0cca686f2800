"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Its shapes do not depend on how much it holds, so that compiled code serves any number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras
import optree
import tensorflow as tf

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_past_key_values
from xglm_core.rounding import rounded_up
from xglm_tf.fast.one_row import slice_update

_BLOCK = 64  # Positions by which storage grows, so that shapes rarely change from one token to the next.


# Differs: caches share no storage, as they do in PyTorch. Tensors cannot be written in place, except by XLA, where
# nothing reads the old one afterwards.
@dataclasses.dataclass(frozen=True, eq=False)
class TFXGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        layers: of each layer the storage of keys and values, each [batch, heads, capacity, head_dim]; then, if there is
            an encoder, keys and values of its positions, each [batch, heads, encoder length, head_dim].
        mask: bool [batch, capacity], False for padding, and where nothing is held yet.
        length: positions held, int32 scalar.
        encoder_mask: bool [batch, encoder length], False for padding; None if there is none.
    """

    layers: tuple[tuple[tf.Tensor, ...], ...]
    mask: tf.Tensor
    length: tf.Tensor
    encoder_mask: tf.Tensor | None = None

    @property
    def batch(self) -> int | None:
        """Rows; None if unknown while tracing."""
        return self.mask.shape[0]

    @property
    def capacity(self) -> int | tf.Tensor:
        """Positions that there is room for."""
        return keras.ops.shape(self.mask)[1]

    @property
    def known_length(self) -> int | None:
        """Positions held; None if unknown while tracing."""
        length = tf.get_static_value(self.length)
        return None if length is None else int(length)

    @property
    def encoder_length(self) -> int | None:
        """Encoder positions held; None without cross-attention, or if unknown while tracing."""
        return self.layers[0][2].shape[2] if len(self.layers[0]) == 4 else None

    def get_seq_length(self, layer_idx: int = 0) -> int | tf.Tensor:
        """Positions held, the same in all layers; a scalar tensor if unknown while tracing."""
        return self.length if self.known_length is None else self.known_length

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> tuple[tf.Tensor, ...]:
        """Key and value of a layer, each [batch, heads, length, head_dim]; then those of the encoder."""
        key, value, *encoder = self.layers[layer]
        return key[:, :, : self.length], value[:, :, : self.length], *encoder

    def __iter__(self) -> Iterator[tuple[tf.Tensor, ...]]:
        return (self[layer] for layer in range(len(self)))

    def mapped(self, change: Callable[[tf.Tensor], tf.Tensor]) -> Self:
        """The cache with other keys and values, those of the encoder apart."""
        layers = tuple((change(key), change(value), *encoder) for key, value, *encoder in self.layers)
        return dataclasses.replace(self, layers=layers)

    # TensorFlow's protocol for classes that its functions and loops may take and return. An absent mask is no part:
    # loops carry tensors only.
    def __tf_flatten__(self) -> tuple[tuple[()], tuple[Any, ...]]:
        encoder_mask = () if self.encoder_mask is None else (self.encoder_mask,)
        return (), (self.layers, self.mask, self.length, *encoder_mask)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[()], components: tuple[Any, ...]) -> Self:
        return cls(*components)


# The same for Keras: what its layers may take and return, and its functional models connect.
register_tree: Any = functools.partial(optree.register_pytree_node, namespace="keras")
register_tree(TFXGLMCache, lambda cache: (cache.__tf_flatten__()[1], ()), TFXGLMCache.__tf_unflatten__)


def empty_cache(config: XGLMConfig, batch: int | tf.Tensor, capacity: int | tf.Tensor, dtype: str) -> TFXGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions."""
    counts = [len(config.kept_heads(index)) for index in range(config.num_layers)]
    # What is never written may be one for all layers.
    storage = {heads: tf.zeros((batch, heads, capacity, config.head_dim), dtype) for heads in set(counts)}
    layers = tuple((storage[heads], storage[heads]) for heads in counts)
    return TFXGLMCache(layers, tf.zeros((batch, capacity), tf.bool), tf.constant(0))


def as_cache(past_key_values: Any, config: XGLMConfig) -> TFXGLMCache | None:
    """A cache from what a caller may pass: a cache, None, or a tuple of per-layer (key, value), which is not copied.

    (key, value) of a layer may also be one tensor [2, batch, heads, length, head_dim], as transformers documents it for
    TensorFlow.

    Raises:
        InputError: it is something else, or its shapes do not fit.
    """
    if past_key_values is None or isinstance(past_key_values, TFXGLMCache):
        return past_key_values
    if isinstance(past_key_values, list | tuple):
        past_key_values = [tf.unstack(layer) if hasattr(layer, "shape") else layer for layer in past_key_values]
    check_past_key_values(config, past_key_values)
    batch, _, length, _ = keras.ops.shape(past_key_values[0][0])
    layers = tuple(map(tuple, past_key_values))
    return TFXGLMCache(layers, tf.ones((batch, length), tf.bool), tf.convert_to_tensor(length))


def extend_cache(
    past: TFXGLMCache | None, config: XGLMConfig, batch: int | tf.Tensor, new: int | tf.Tensor, dtype: str
) -> TFXGLMCache:
    """A cache like `past` with room for `new` positions, to be filled by `write` layer by layer.

    Its length and mask are still those of `past`. Where the capacity is fixed and the length unknown, in compiled code,
    it stays as it is, and the positions must fit.

    Args:
        past: what was read before, or None; it stays valid and unchanged.
        config: the model's configuration.
        batch: rows.
        new: positions to add.
        dtype: type of keys and values.
    """
    if past is None:
        return empty_cache(config, batch, rounded_up(new, _BLOCK), dtype)
    capacity, needed = past.capacity, rounded_up(past.get_seq_length() + new, _BLOCK)
    if not isinstance(capacity, int):
        return with_capacity(past, tf.maximum(capacity, needed))
    return with_capacity(past, max(capacity, needed)) if isinstance(needed, int) else past


def with_capacity(cache: TFXGLMCache, capacity: int | tf.Tensor) -> TFXGLMCache:
    """The cache with room for `capacity` positions, not fewer than now; itself if it has that.

    Differs: PyTorch's caches grow by themselves.
    """
    more = capacity - cache.capacity
    if isinstance(more, int) and more == 0:
        return cache
    roomy = cache.mapped(lambda states: tf.pad(states, ((0, 0), (0, 0), (0, more), (0, 0))))
    return dataclasses.replace(roomy, mask=tf.pad(cache.mask, ((0, 0), (0, more))))


def reordered(cache: TFXGLMCache, rows: tf.Tensor) -> TFXGLMCache:
    """A cache of these rows of another one, integers [new rows], with room for as many positions."""
    length = cache.length
    of_rows: TFXGLMCache = tf.nest.map_structure(lambda part: part if part is length else tf.gather(part, rows), cache)
    return of_rows


def picked(cache: TFXGLMCache, places: tf.Tensor, mask: tf.Tensor) -> TFXGLMCache:
    """A cache of some positions of each row.

    Args:
        cache: that of all positions.
        places: which, integers [batch, length].
        mask: bool [batch, length], False for padding.
    """
    length = places.shape[1]
    fresh = cache.mapped(lambda states: tf.gather(states, places, axis=2, batch_dims=1))
    fresh = dataclasses.replace(fresh, mask=tf.convert_to_tensor(mask), length=tf.constant(length))
    return with_capacity(fresh, rounded_up(length, _BLOCK))


def write(storage: tf.Tensor, new: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """`storage` [batch, heads, capacity, head_dim] with `new` [batch, heads, new, head_dim] from `start` on.

    Differs: it returns another tensor, where `XGLMCache.write` in PyTorch writes into its storage; and gradients flow
    through all of it, as nothing is overwritten.
    """
    return (_write if tf.executing_eagerly() else _write_traced)(storage, new, start)


@tf.custom_gradient
def _write(storage: tf.Tensor, new: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
    """See `write`; the operation that does it has no gradient in TensorFlow."""

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, None]:
        positions = start + tf.range(tf.shape(new)[2])
        return _write(upstream, tf.zeros_like(new), start), tf.gather(upstream, positions, axis=2), None

    return slice_update(storage, new, start), gradient


# TensorFlow never forgets a graph in which it met a custom gradient. Here it meets a small one: the caller's would keep
# all weights in memory after the model is gone.
_write_traced = tf.function(_write, autograph=False)
