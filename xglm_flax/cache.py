"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Differs: it is a pytree of arrays whose shapes depend on its capacity alone, so that code compiled for one
length serves all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_cache, check_past_key_values
from xglm_flax.stacking import by_layer

KeyValue = tuple[jax.Array, jax.Array]
Length = jax.Array | np.ndarray | int  # A count of positions.
ByLayer = tuple[jax.Array, ...] | jax.Array  # One array for each layer, or all of them stacked along a first axis.

_BLOCK = 64  # Positions by which storage grows: each capacity is compiled for once.


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxXGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        keys, values: for each layer [batch, heads, capacity, head_dim], of which `length` positions are filled; one
            array [num_layers, ...] if the layers are scanned.
        mask: bool [batch, capacity], False for padding.
        length: positions held, int32 [].
        encoder: per layer, key and value of the encoder's positions, each [batch, heads, encoder length, head_dim];
            empty without cross-attention.
        encoder_mask: bool [batch, encoder length], False for padding; None if there is none.
        fixed: whether the capacity was chosen by the user and must not grow.
    """

    keys: ByLayer
    values: ByLayer
    mask: jax.Array
    length: Length
    encoder: tuple[KeyValue, ...] = ()
    encoder_mask: jax.Array | None = None
    fixed: bool = False

    @property
    def batch(self) -> int:
        """Rows."""
        return self.mask.shape[0]

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.mask.shape[1]

    @property
    def encoder_length(self) -> int | None:
        """Encoder positions held; None without cross-attention."""
        return self.encoder[0][0].shape[2] if self.encoder else None

    def written(self, keys: ByLayer, values: ByLayer, new: int) -> FlaxXGLMCache:
        """This cache with `new` more positions.

        Args:
            keys, values: for each layer [batch, heads, capacity, head_dim], or only as far as they are filled.
            new: how many of these positions are new.
        """
        return dataclasses.replace(
            self,
            keys=jax.tree.map(functools.partial(_padded, capacity=self.capacity), keys),
            values=jax.tree.map(functools.partial(_padded, capacity=self.capacity), values),
            length=self.length + new,
        )

    def get_seq_length(self, layer_idx: int = 0) -> Length:
        """Positions held, the same in all layers; an array while traced."""
        return self.length if is_traced(self.length) else int(self.length)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[jax.Array, ...]:
        """Key and value of a layer, each [batch, heads, length, head_dim]; then those of the encoder.

        While the length is traced, key and value are of the whole capacity.
        """
        filled = self.capacity if is_traced(self.length) else int(self.length)
        own = (self.keys[layer][:, :, :filled], self.values[layer][:, :, :filled])
        return (*own, *self.encoder[layer]) if self.encoder else own

    def __iter__(self) -> Iterator[tuple[jax.Array, ...]]:
        return (self[layer] for layer in range(len(self)))


jax.tree_util.register_dataclass(
    FlaxXGLMCache,
    data_fields=["keys", "values", "mask", "length", "encoder", "encoder_mask"],
    meta_fields=["fixed"],
)


def empty_cache(
    config: XGLMConfig, batch: int, capacity: int, dtype: Any, *, stacked: bool = False, fixed: bool = False
) -> FlaxXGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions; `stacked` for scanned layers."""
    shapes = [(batch, len(config.kept_heads(i)), capacity, config.head_dim) for i in range(config.num_layers)]

    def empty() -> ByLayer:
        return jnp.zeros((len(shapes), *shapes[0]), dtype) if stacked else tuple(jnp.zeros(s, dtype) for s in shapes)

    # A numpy length is known even while the caller is traced.
    return FlaxXGLMCache(empty(), empty(), jnp.zeros((batch, capacity), bool), np.zeros((), np.int32), fixed=fixed)


def as_cache(past_key_values: Any, config: XGLMConfig, dtype: Any) -> FlaxXGLMCache | None:
    """A cache from what a caller may pass: a cache, None, or a tuple of per-layer (key, value), cast to `dtype`.

    Raises:
        InputError: it is something else, or its shapes do not fit.
    """
    if past_key_values is None or isinstance(past_key_values, FlaxXGLMCache):
        return past_key_values
    check_past_key_values(config, past_key_values)
    keys, values, *encoder = (
        tuple(jnp.asarray(array, dtype) for array in arrays) for arrays in zip(*past_key_values, strict=True)
    )
    batch, length = keys[0].shape[0], keys[0].shape[2]
    mask, length_ = jnp.ones((batch, length), bool), np.asarray(length, np.int32)
    return FlaxXGLMCache(keys, values, mask, length_, tuple(zip(*encoder, strict=True)))


def extend_cache(
    past: FlaxXGLMCache | None, config: XGLMConfig, new: int, mask: jax.Array | None, like: jax.Array, *, stacked: bool
) -> FlaxXGLMCache:
    """The cache for `new` positions after `past`, to be filled by `FlaxXGLMCache.written`.

    Differs: `past` has the room already, see `with_room`, and its length stays until all layers have run.

    Args:
        past: what was read before, or None.
        config: the model's configuration.
        new: positions to add.
        mask: bool [batch, capacity], or [batch, new] without `past`, False for padding; None if there is none.
        like: hidden states [batch, new, d_model], for batch size and type.
        stacked: whether the layers are scanned.
    """
    if past is None:
        # A size that `jax.export` leaves open is one for all.
        capacity = _rounded_up(new) if isinstance(new, int) else new
        past = empty_cache(config, like.shape[0], capacity, like.dtype, stacked=stacked)
    if mask is None:
        mask = jnp.ones((like.shape[0], new), bool)
    return dataclasses.replace(
        past,
        keys=by_layer(past.keys, stacked=stacked),
        values=by_layer(past.values, stacked=stacked),
        mask=jnp.pad(mask, ((0, 0), (0, past.capacity - mask.shape[1]))),
    )


def put(states: jax.Array, new: jax.Array, start: Length) -> jax.Array:
    """Keys or values [..., capacity, head_dim] with those of new positions from `start` on."""
    if states.shape[0] == 1 and states.ndim > 2:
        # XLA would drop this axis later, and then not see that it could write in place.
        return put(states[0], new[0], start)[None]
    return jax.lax.dynamic_update_slice_in_dim(states, new, start, axis=states.ndim - 2)


def with_room(cache: FlaxXGLMCache, new: int) -> FlaxXGLMCache:
    """The cache with room for `new` more positions; itself if it has that.

    A traced length has no value to look at: then the caller sees to the room.

    Raises:
        InputError: the capacity is fixed and too small.
    """
    if is_traced(cache.length):
        return cache
    length = int(cache.length)
    if cache.fixed:
        check_cache(length, new, cache.capacity)
        return cache
    return with_capacity(cache, max(cache.capacity, _rounded_up(length + new)))


def with_capacity(cache: FlaxXGLMCache, capacity: int) -> FlaxXGLMCache:
    """The cache with room for `capacity` positions, not fewer than now; itself if it has that."""
    if capacity == cache.capacity:
        return cache
    return dataclasses.replace(
        cache,
        keys=jax.tree.map(functools.partial(_padded, capacity=capacity), cache.keys),
        values=jax.tree.map(functools.partial(_padded, capacity=capacity), cache.values),
        mask=jnp.pad(cache.mask, ((0, 0), (0, capacity - cache.capacity))),
    )


def reordered(cache: FlaxXGLMCache, rows: jax.Array, capacity: int) -> FlaxXGLMCache:
    """A cache of these rows of another one, integers [new rows], with room for `capacity` positions.

    Differs: rows and room in one step, as each copies; and the layers are not stacked, however they were.
    """

    def taken(array: Any) -> jax.Array:
        return jnp.take(array, rows, axis=0, mode="clip")

    keys, values = (tuple(map(taken, by_layer(items, stacked=False))) for items in (cache.keys, cache.values))
    encoder, encoder_mask = jax.tree.map(taken, (cache.encoder, cache.encoder_mask))
    fresh = FlaxXGLMCache(keys, values, taken(cache.mask), cache.length, encoder, encoder_mask)
    return with_capacity(fresh, capacity)


def picked(cache: FlaxXGLMCache, places: jax.Array, mask: jax.Array) -> FlaxXGLMCache:
    """A cache of some positions of each row.

    Args:
        cache: that of all positions.
        places: which, integers [batch, length].
        mask: bool [batch, length], False for padding.
    """

    def taken(states: jax.Array) -> jax.Array:
        return jnp.take_along_axis(states, places[:, None, :, None], axis=2)

    length = places.shape[1]
    keys, values = (tuple(map(taken, by_layer(items, stacked=False))) for items in (cache.keys, cache.values))
    fresh = FlaxXGLMCache(keys, values, mask, np.asarray(length, np.int32), cache.encoder, cache.encoder_mask)
    return with_capacity(fresh, _rounded_up(length))


def _padded(states: jax.Array, capacity: int) -> jax.Array:
    """Keys or values [..., positions, head_dim] with room for `capacity` positions."""
    more = capacity - states.shape[-2]
    return jnp.pad(states, [(0, 0)] * (states.ndim - 2) + [(0, more), (0, 0)]) if more else states


def _rounded_up(length: int) -> int:
    """The capacity for `length` positions."""
    return -(-length // _BLOCK) * _BLOCK


def is_traced(value: Any) -> bool:
    """Whether a value is unknown yet, because jit, grad or vmap is looking at the code."""
    return isinstance(value, jax.core.Tracer)
