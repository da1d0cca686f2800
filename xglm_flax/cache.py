"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Differs: it is a pytree of arrays whose shapes depend on its capacity alone, so that code compiled for one
length serves all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_cache

_BLOCK = 64  # Positions by which storage grows: each capacity is compiled for once.


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxXGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        keys, values: one array [batch, heads, capacity, head_dim] per layer, of which `length` positions are filled.
        mask: bool [batch, capacity], False for padding.
        length: positions held, int32 [].
        fixed: whether the capacity was chosen by the user and must not grow.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array
    fixed: bool = False

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.mask.shape[1]

    def write(self, layer: int, key: jax.Array, value: jax.Array) -> FlaxXGLMCache:
        """This cache with a layer's new keys and values, each [batch, heads, new, head_dim], after the older ones."""
        return dataclasses.replace(
            self,
            keys=_replaced(self.keys, layer, self._written(self.keys[layer], key)),
            values=_replaced(self.values, layer, self._written(self.values[layer], value)),
        )

    def _written(self, states: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(states, new, self.length, axis=2)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Key and value of a layer, each [batch, heads, length, head_dim]; of the whole capacity while traced."""
        filled = self.capacity if is_traced(self.length) else int(self.length)
        return self.keys[layer][:, :, :filled], self.values[layer][:, :, :filled]

    def __iter__(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        return (self[layer] for layer in range(len(self)))


jax.tree_util.register_dataclass(FlaxXGLMCache, data_fields=["keys", "values", "mask", "length"], meta_fields=["fixed"])


def empty_cache(config: XGLMConfig, batch: int, capacity: int, dtype: Any, *, fixed: bool = False) -> FlaxXGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions."""
    shape = (batch, config.attention_heads, capacity, config.head_dim)
    return FlaxXGLMCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        mask=jnp.zeros((batch, capacity), bool),
        length=jnp.zeros((), jnp.int32),
        fixed=fixed,
    )


def extend_cache(
    past: FlaxXGLMCache | None, config: XGLMConfig, new: int, mask: jax.Array | None, like: jax.Array
) -> FlaxXGLMCache:
    """The cache for `new` positions after `past`, to be filled by `FlaxXGLMCache.write` layer by layer.

    Differs: `past` has the room already, see `with_room`, and its length stays until all layers have written.

    Args:
        past: what was read before, or None.
        config: the model's configuration.
        new: positions to add.
        mask: bool [batch, capacity], or [batch, new] without `past`, False for padding; None if there is none.
        like: hidden states [batch, new, d_model], for batch size and type.
    """
    if past is None:
        past = empty_cache(config, len(like), _rounded_up(new), like.dtype)
    if mask is None:
        mask = jnp.ones((len(like), new), bool)
    return dataclasses.replace(past, mask=jnp.pad(mask, ((0, 0), (0, past.capacity - mask.shape[1]))))


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
    more = capacity - cache.capacity
    if more == 0:
        return cache
    return dataclasses.replace(
        cache,
        keys=tuple(jnp.pad(states, ((0, 0), (0, 0), (0, more), (0, 0))) for states in cache.keys),
        values=tuple(jnp.pad(states, ((0, 0), (0, 0), (0, more), (0, 0))) for states in cache.values),
        mask=jnp.pad(cache.mask, ((0, 0), (0, more))),
    )


def _rounded_up(length: int) -> int:
    """The capacity for `length` positions."""
    return -(-length // _BLOCK) * _BLOCK


def is_traced(value: Any) -> bool:
    """Whether a value is unknown yet, because jit, grad or vmap is looking at the code."""
    return isinstance(value, jax.core.Tracer)


def _replaced(items: tuple[jax.Array, ...], index: int, item: jax.Array) -> tuple[jax.Array, ...]:
    return (*items[:index], item, *items[index + 1 :])
