"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Storage is allocated in blocks and written in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import register_pytree_node

from xglm_core.config import XGLMConfig
from xglm_core.inputs import check_past_key_values

KeyValue = tuple[torch.Tensor, torch.Tensor]

_BLOCK = 64  # Positions by which storage grows, so that most one-token steps allocate nothing.


class _Storage:
    """The memory that successive caches share: per layer [batch, heads, capacity, head_dim]."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], filled: int) -> None:
        self.keys = keys
        self.values = values
        self.filled = filled  # Positions written so far, by whichever cache went furthest.

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]


class XGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        length: positions held.
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
        mask: torch.Tensor | None,
        encoder: tuple[KeyValue, ...] = (),
        encoder_mask: torch.Tensor | None = None,
    ) -> None:
        self._storage = storage
        self._past = past
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
        past, length = self._past, self.length
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
    return XGLMCache(_allocated(config, batch, capacity, like), past=0, length=0, mask=None)


def as_cache(past_key_values: Any, config: XGLMConfig) -> XGLMCache | None:
    """A cache from what a caller may pass: a cache, None, or a tuple of per-layer (key, value), which is not copied.

    A cache of transformers is read as such a tuple; an empty one is as good as None.

    Raises:
        InputError: it is something else, or its shapes do not fit.
    """
    if past_key_values is None or isinstance(past_key_values, XGLMCache):
        return past_key_values
    if is_foreign(past_key_values):
        past_key_values = _pairs(past_key_values)
        if not past_key_values:
            return None
    check_past_key_values(config, past_key_values)
    keys, values = [layer[0] for layer in past_key_values], [layer[1] for layer in past_key_values]
    length = keys[0].shape[2]
    encoder = tuple((layer[2], layer[3]) for layer in past_key_values if len(layer) == 4)
    # Full, so that nothing is ever written into what is the caller's.
    return XGLMCache(_Storage(keys, values, filled=length), past=length, length=length, mask=None, encoder=encoder)


def is_foreign(past_key_values: Any) -> bool:
    """Whether it is a cache of transformers; which is known by its methods, as that package is not imported."""
    has_layers = hasattr(past_key_values, "layers") or hasattr(past_key_values, "to_legacy_cache")
    return has_layers and hasattr(past_key_values, "get_seq_length") and hasattr(past_key_values, "update")


def _pairs(foreign: Any) -> tuple[KeyValue, ...]:
    """Key and value of each layer of a cache of transformers, as far as it is filled; nothing if it is empty."""
    length = int(foreign.get_seq_length())
    if hasattr(foreign, "layers"):
        layers = [(layer.keys, layer.values) for layer in foreign.layers]
    else:  # Before transformers 4.54.
        layers = foreign.to_legacy_cache()
    return tuple((key[:, :, :length], value[:, :, :length]) for key, value in layers) if length else ()


def update_foreign(foreign: Any, cache: XGLMCache, past: int) -> None:
    """Gives a cache of transformers the positions from `past` on, as there each call does."""
    for index, (key, value, *_) in enumerate(cache):
        foreign.update(key[:, :, past:], value[:, :, past:], index)


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
    if storage is None or storage.capacity < length or storage.filled != start or sealed:
        # No room, not to be written outside of inference mode, or another cache has already gone on from here: continue
        # in storage of our own.
        fresh = _allocated(config, like.shape[0], -(-length // _BLOCK) * _BLOCK, like)
        if storage is not None:
            for ours, theirs in zip(fresh.keys + fresh.values, storage.keys + storage.values, strict=True):
                ours[:, :, :start] = theirs[:, :, :start]
        storage = fresh
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
    fresh = _allocated(config, len(rows), storage.capacity, like=storage.keys[0])
    for ours, theirs in zip(fresh.keys + fresh.values, storage.keys + storage.values, strict=True):
        ours[:, :, :length] = theirs[rows.to(theirs.device), :, :length]
    fresh.filled = length
    return XGLMCache(
        fresh,
        length,
        length,
        None if cache.mask is None else cache.mask[rows],
        tuple((key[rows], value[rows]) for key, value in cache.encoder),
        None if cache.encoder_mask is None else cache.encoder_mask[rows],
    )


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


def _flattened(cache: XGLMCache) -> tuple[list[Any], list[str]]:
    masks = {name: mask for name in ("mask", "encoder_mask") if (mask := getattr(cache, name)) is not None}
    return [tuple(cache), *masks.values()], list(masks)


def _unflattened(children: Any, names: list[str]) -> XGLMCache:
    layers, *masks = children
    keys, values = [layer[0] for layer in layers], [layer[1] for layer in layers]
    length = keys[0].shape[2]
    cache = XGLMCache(_Storage(keys, values, filled=length), past=length, length=length, mask=None)
    cache.encoder = tuple(layer[2:] for layer in layers if len(layer) == 4)
    for name, mask in zip(names, masks, strict=True):
        setattr(cache, name, mask)
    return cache


# What `torch.export` and others need to know of a class that a model takes or returns.
register_pytree_node(XGLMCache, _flattened, _unflattened, serialized_type_name="xglm_torch.XGLMCache")
