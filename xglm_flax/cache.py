"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Differs: in PyTorch caches share storage. Here, as in Keras, a cache is a tree of arrays. Their shapes
depend on its capacity alone, so that code compiled for one length serves all lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_cache, check_past_key_values
from xglm_core.rounding import rounded_up

KeyValue = tuple[jax.Array, jax.Array]
Length = jax.Array | np.ndarray | int  # A count of positions.

_BLOCK = 64  # Positions by which storage grows: each capacity is compiled for once.


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxXGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        keys, values: for each layer [batch, heads, capacity, head_dim], of which `length` positions are filled.
        mask: bool [batch, capacity], False for padding.
        length: positions held, int32 [].
        encoder: per layer, key and value of the encoder's positions, each [batch, heads, encoder length, head_dim];
            empty without cross-attention.
        encoder_mask: bool [batch, encoder length], False for padding; None if there is none.
        fixed: whether the capacity was chosen by the user and must not grow.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
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

    def mapped(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """The cache with other keys and values, those of the encoder apart."""
        return dataclasses.replace(self, keys=tuple(map(change, self.keys)), values=tuple(map(change, self.values)))


jax.tree_util.register_dataclass(
    FlaxXGLMCache,
    data_fields=["keys", "values", "mask", "length", "encoder", "encoder_mask"],
    meta_fields=["fixed"],
)


def empty_cache(config: XGLMConfig, batch: int, capacity: int, dtype: Any, *, fixed: bool = False) -> FlaxXGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions."""
    shapes = [(batch, len(config.kept_heads(i)), capacity, config.head_dim) for i in range(config.num_layers)]
    keys, values = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
    # A numpy length is known even while the caller is traced.
    return FlaxXGLMCache(keys, values, jnp.zeros((batch, capacity), bool), np.zeros((), np.int32), fixed=fixed)


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
    past: FlaxXGLMCache | None,
    keys_and_values: tuple[KeyValue, ...],
    encoder: tuple[KeyValue, ...] | None,
    mask: jax.Array | None,
    encoder_mask: jax.Array | None,
    new: int,
) -> FlaxXGLMCache:
    """The cache after `new` positions.

    Differs: PyTorch and Keras extend a cache before the blocks run, which write into it. Here each block returns what
    it wrote, and this makes a cache of it.

    Args:
        past: what was read before, with room for the new positions, see `with_room`; or None.
        keys_and_values: of each layer, of all that `past` has room for; without `past`, of the new positions.
        encoder: the encoder's, of each layer; None if there is none.
        mask: bool [batch, capacity], or [batch, new] without `past`, False for padding; None if there is none.
        encoder_mask: bool [batch, encoder length], or None.
        new: how many positions are new.
    """
    keys, values = zip(*keys_and_values, strict=True)
    if mask is None:
        mask = jnp.ones((keys[0].shape[0], new), bool)
    if past is not None:
        return FlaxXGLMCache(keys, values, mask, past.length + new, encoder or (), encoder_mask, past.fixed)
    cache = FlaxXGLMCache(keys, values, mask, np.zeros((), np.int32) + new, encoder or (), encoder_mask)
    # A size that `jax.export` leaves open is not rounded.
    return with_capacity(cache, rounded_up(new, _BLOCK)) if isinstance(new, int) else cache


def write(states: jax.Array, new: jax.Array, start: Length) -> jax.Array:
    """Keys or values [batch, heads, capacity, head_dim] with those of new positions from `start` on."""
    if states.shape[0] == 1:  # See fast/one_row.py.
        return jax.lax.dynamic_update_slice_in_dim(states[0], new[0], start, axis=1)[None]
    return jax.lax.dynamic_update_slice_in_dim(states, new, start, axis=2)


def with_room(cache: FlaxXGLMCache, new: int) -> FlaxXGLMCache:
    """The cache with room for `new` more positions; itself if it has that.

    A traced length has no value to look at: then the caller sees to the room.

    Differs: TF makes room in `extend_cache`; PyTorch's caches grow by themselves.

    Raises:
        InputError: the capacity is fixed and too small.
    """
    if is_traced(cache.length):
        return cache
    length = int(cache.length)
    if cache.fixed:
        check_cache(length, new, cache.capacity)
        return cache
    return with_capacity(cache, max(cache.capacity, rounded_up(length + new, _BLOCK)))


def with_capacity(cache: FlaxXGLMCache, capacity: int) -> FlaxXGLMCache:
    """The cache with room for `capacity` positions, not fewer than now; itself if it has that."""
    more = capacity - cache.capacity
    if not more:
        return cache
    fresh = cache.mapped(lambda states: jnp.pad(states, ((0, 0), (0, 0), (0, more), (0, 0))))
    return dataclasses.replace(fresh, mask=jnp.pad(cache.mask, ((0, 0), (0, more))))


def reordered(cache: FlaxXGLMCache, rows: jax.Array, capacity: int) -> FlaxXGLMCache:
    """A cache of these rows of another one, integers [new rows], with room for `capacity` positions.

    Differs: PyTorch and Keras make room when they write. Here compiled code does both in one copy.
    """

    def taken(array: Any) -> jax.Array:
        return jnp.take(array, rows, axis=0, mode="clip")

    fields = {name: jax.tree.map(taken, getattr(cache, name)) for name in ("mask", "encoder", "encoder_mask")}
    return with_capacity(dataclasses.replace(cache.mapped(taken), **fields, fixed=False), capacity)


def picked(cache: FlaxXGLMCache, places: jax.Array, mask: jax.Array) -> FlaxXGLMCache:
    """A cache of some positions of each row.

    Args:
        cache: that of all positions.
        places: which, integers [batch, length].
        mask: bool [batch, length], False for padding.
    """
    fresh = cache.mapped(lambda states: jnp.take_along_axis(states, places[:, None, :, None], axis=2))
    length = places.shape[1]
    fresh = dataclasses.replace(fresh, mask=mask, length=np.asarray(length, np.int32), fixed=False)
    return with_capacity(fresh, rounded_up(length, _BLOCK))


def is_traced(value: Any) -> bool:
    """Whether a value is unknown yet, because jit, grad or vmap is looking at the code.

    Differs: PyTorch and TF have this in `inputs.py`.
    """
    return isinstance(value, jax.core.Tracer)
