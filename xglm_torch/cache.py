"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Storage is allocated in blocks and written in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import register_pytree_node

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_past_key_values
from xglm_core.rounding import rounded_up
from xglm_torch.foreign_cache import foreign_pairs, is_foreign

KeyValue = tuple[torch.Tensor, torch.Tensor]

_BLOCK = 64  # Positions by which storage grows, so that most one-token steps allocate nothing.


@dataclass(eq=False)
class _Storage:
    """The memory that successive caches share: of each layer, [batch, heads, capacity, head_dim].

    `filled` is how many positions have been written, by whichever cache went furthest.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    filled: int


class XGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        length: positions held.
        past: how many of them there were before the call that this cache is for.
        mask: bool [batch, length], False for padding; None if there is none.
        encoder: per layer, key and value of the encoder's positions, each [batch, heads, encoder length, head_dim];
            empty without cross-attention.
        encoder_mask: bool [batch, encoder length], False for padding; None if there is none.
    """

    def __init__(
        self,
        storage: _Storage,
        past: int,
        length: int,
        mask: torch.Tensor | None = None,
        encoder: tuple[KeyValue, ...] = (),
        encoder_mask: torch.Tensor | None = None,
    ) -> None:
        self._storage = storage
        self.past = past
        self.length = length
        self.mask = mask
        self.encoder = encoder
        self.encoder_mask = encoder_mask

    @property
    def batch(self) -> int:
        """Rows."""
        return self._storage.keys[0].shape[0]

    @property
    def encoder_length(self) -> int | None:
        """Encoder positions held; None without cross-attention."""
        return self.encoder[0][0].shape[2] if self.encoder else None

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """Stores a layer's new keys and values, each [batch, heads, new, head_dim]; returns those of all positions."""
        past, length = self.past, self.length
        storage = self._storage
        if storage.keys[layer].device != key.device:  # Blocks may be on several devices.
            for held in (storage.keys, storage.values):
                held[layer] = held[layer].to(key.device)
        keys, values = storage.keys[layer], storage.values[layer]
        keys[:, :, past:length] = key.detach()
        values[:, :, past:length] = value.detach()
        if past == 0:
            return key, value
        if torch.is_grad_enabled() and (key.requires_grad or keys.requires_grad):
            # Gradients flow through the new positions, and through keys and values that the caller made.
            return torch.cat([keys[:, :, :past], key], dim=2), torch.cat([values[:, :, :past], value], dim=2)
        return keys[:, :, :length], values[:, :, :length]

    def write_encoder(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores the next layer's keys and values of the encoder's positions."""
        self.encoder = (*self.encoder, (key.detach(), value.detach()))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held, by the name that transformers has for it."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: storage grows without limit."""
        return -1

    def __len__(self) -> int:
        return len(self._storage.keys)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Key and value of a layer as views, each [batch, heads, length, head_dim]; then those of the encoder."""
        keys, values = self._storage.keys[layer], self._storage.values[layer]
        own = (keys[:, :, : self.length], values[:, :, : self.length])
        return (*own, *self.encoder[layer]) if self.encoder else own

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return (self[layer] for layer in range(len(self)))


def empty_cache(config: XGLMConfig, batch: int, capacity: int, like: torch.Tensor) -> XGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions, of the type and on the device of `like`."""
    return XGLMCache(_allocated(config, batch, capacity, like), past=0, length=0)


def as_cache(past_key_values: Any, config: XGLMConfig) -> XGLMCache | None:
    """A cache from what a caller may pass: a cache, None, or a tuple of per-layer (key, value), which is not copied.

    A cache of transformers is read as such a tuple; an empty one is as good as None.

    Raises:
        InputError: it is something else, or its shapes do not fit.
    """
    if past_key_values is None or isinstance(past_key_values, XGLMCache):
        return past_key_values
    if is_foreign(past_key_values):
        past_key_values = foreign_pairs(past_key_values)
        if not past_key_values:
            return None
    check_past_key_values(config, past_key_values)
    return _full_cache(past_key_values)


def extend_cache(
    past: XGLMCache | None, config: XGLMConfig, new: int, mask: torch.Tensor | None, like: torch.Tensor
) -> XGLMCache:
    """The cache for `new` positions after `past`, to be filled by `XGLMCache.write` layer by layer.

    Args:
        past: what was read before, or None; it stays valid and unchanged.
        config: the model's configuration.
        new: positions to add.
        mask: bool [batch, past + new], False for padding; None if there is none.
        like: hidden states [batch, new, d_model], for batch size, type and device.
    """
    start = 0 if past is None else past.length
    length = start + new
    storage = None if past is None else past._storage
    free = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    sealed = storage is not None and not free and storage.keys[0].is_inference()
    if storage is None or storage.keys[0].shape[2] < length or storage.filled != start or sealed:
        # No room, not to be written outside of inference mode, or another cache has already gone on from here: continue
        # in storage of our own.
        fresh = _allocated(config, like.shape[0], rounded_up(length, _BLOCK), like)
        storage = fresh if storage is None else _filled(fresh, storage, start)
    storage.filled = length
    if past is None:
        return XGLMCache(storage, start, length, mask)
    encoder = past.encoder
    if sealed:
        encoder = tuple((key.clone(), value.clone()) for key, value in encoder)
    return XGLMCache(storage, start, length, mask, encoder, past.encoder_mask)


def reordered(cache: XGLMCache, config: XGLMConfig, rows: torch.Tensor) -> XGLMCache:
    """A cache of these rows of another one, integers [new rows], with room for as many positions."""
    storage, length = cache._storage, cache.length
    fresh = _allocated(config, len(rows), storage.keys[0].shape[2], like=storage.keys[0])
    encoder = tuple((key[rows], value[rows]) for key, value in cache.encoder)
    mask, encoder_mask = (None if mask is None else mask[rows] for mask in (cache.mask, cache.encoder_mask))
    return XGLMCache(_filled(fresh, storage, length, rows), length, length, mask, encoder, encoder_mask)


def picked(cache: XGLMCache, places: torch.Tensor, mask: torch.Tensor) -> XGLMCache:
    """A cache of some positions of each row.

    Args:
        cache: that of all positions.
        places: which, integers [batch, length].
        mask: bool [batch, length], False for padding.
    """
    index, length = places[:, None, :, None], places.shape[1]
    keys, values = (
        [torch.take_along_dim(states, index, dim=2) for states in storage]
        for storage in (cache._storage.keys, cache._storage.values)
    )
    storage = _Storage(keys, values, filled=length)
    return XGLMCache(storage, length, length, mask, cache.encoder, cache.encoder_mask)


def _allocated(config: XGLMConfig, batch: int, capacity: int, like: torch.Tensor) -> _Storage:
    shapes = [(batch, len(config.kept_heads(i)), capacity, config.head_dim) for i in range(config.num_layers)]
    return _Storage([like.new_empty(shape) for shape in shapes], [like.new_empty(shape) for shape in shapes], filled=0)


def _filled(storage: _Storage, source: _Storage, length: int, rows: torch.Tensor | None = None) -> _Storage:
    """The storage, with the first positions of another one, or of rows of it."""
    for ours, theirs in zip(storage.keys + storage.values, source.keys + source.values, strict=True):
        ours[:, :, :length] = theirs[:, :, :length] if rows is None else theirs[rows.to(theirs.device), :, :length]
    storage.filled = length
    return storage


def _full_cache(layers: Sequence[Sequence[torch.Tensor]]) -> XGLMCache:
    """A cache of given tensors, as `XGLMCache.__getitem__` returns them. Nothing is ever written into them."""
    keys, values = [layer[0] for layer in layers], [layer[1] for layer in layers]
    length = keys[0].shape[2]
    encoder = tuple((layer[2], layer[3]) for layer in layers if len(layer) == 4)
    return XGLMCache(_Storage(keys, values, filled=length), past=length, length=length, encoder=encoder)


def _flattened(cache: XGLMCache) -> tuple[list[Any], list[str]]:
    masks = {name: mask for name in ("mask", "encoder_mask") if (mask := getattr(cache, name)) is not None}
    return [tuple(cache), *masks.values()], list(masks)


def _unflattened(children: Any, names: list[str]) -> XGLMCache:
    layers, *masks = children
    cache = _full_cache(layers)
    for name, mask in zip(names, masks, strict=True):
        setattr(cache, name, mask)
    return cache


# What `torch.export` and others need to know of a class that a model takes or returns.
register_pytree_node(XGLMCache, _flattened, _unflattened, serialized_type_name="xglm_torch.XGLMCache")
