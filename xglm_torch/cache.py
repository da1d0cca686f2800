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
from xglm_torch.foreign_cache import without_foreign

KeyValue = tuple[torch.Tensor, torch.Tensor]

_BLOCK = 64  # Positions by which storage grows, so that most one-token steps allocate nothing.


class _Storage:
    """The memory that successive caches share: of each layer, [batch, heads, capacity, head_dim].

    `filled` is how many positions have been written, by whichever cache went furthest. It is no data class: FSDP would
    make another one of it for each call.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], filled: int) -> None:
        self.keys, self.values, self.filled = keys, values, filled


@dataclass(eq=False, repr=False)
class XGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        length: positions held.
        past: how many of them there were before the call that this cache is for.
        encoder: per layer, key and value of the encoder's positions, each [batch, heads, encoder length, head_dim]; or
            nothing.
        mask: bool [batch, length], False for padding; None if there is none.
        encoder_mask: bool [batch, encoder length], False for padding; None if there is none.
    """

    _storage: _Storage
    past: int
    length: int
    encoder: list[tuple[torch.Tensor, ...]]
    mask: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return self._storage.keys[0].shape[0]

    @property
    def encoder_length(self) -> int | None:
        """Encoder positions held; None without cross-attention."""
        return self.encoder[0][0].shape[2] if self.encoder[0] else None

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

    def write_encoder(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores a layer's keys and values of the encoder's positions."""
        self.encoder[layer] = key.detach(), value.detach()

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
        return keys[:, :, : self.length], values[:, :, : self.length], *self.encoder[layer]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return (self[layer] for layer in range(len(self)))


def empty_cache(config: XGLMConfig, batch: int, capacity: int, like: torch.Tensor) -> XGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions, of the type and on the device of `like`."""
    shapes = [(batch, len(config.kept_heads(i)), capacity, config.head_dim) for i in range(config.num_layers)]
    keys, values = ([like.new_empty(shape) for shape in shapes] for _ in range(2))
    return XGLMCache(_Storage(keys, values, filled=0), 0, 0, [()] * config.num_layers)


def as_cache(past_key_values: Any, config: XGLMConfig) -> XGLMCache | None:
    """A cache from what a caller may pass: a cache, None, or a tuple of per-layer (key, value), which is not copied.

    A cache of transformers is read as such a tuple; an empty one is as good as None.

    Raises:
        InputError: it is something else, or its shapes do not fit.
    """
    past_key_values = without_foreign(past_key_values)
    if past_key_values is None or isinstance(past_key_values, XGLMCache):
        return past_key_values
    check_past_key_values(config, past_key_values)
    return _full_cache(past_key_values)


def extend_cache(
    past: XGLMCache | None,
    config: XGLMConfig,
    new: int,
    masks: tuple[torch.Tensor | None, torch.Tensor | None],
    like: torch.Tensor,
) -> XGLMCache:
    """The cache for `new` positions after `past`, to be filled by `XGLMCache.write` layer by layer.

    Args:
        past: what was read before, or None; it stays valid and unchanged.
        config: the model's configuration.
        new: positions to add.
        masks: bool [batch, past + new] and [batch, encoder length], False for padding; None if there is none.
        like: hidden states [batch, new, d_model], for batch size, type and device.
    """
    if past is None:
        past = empty_cache(config, like.shape[0], rounded_up(new, _BLOCK), like)
    storage, length = past._storage, past.length + new
    sealed = not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()) and storage.keys[0].is_inference()
    if storage.keys[0].shape[2] < length or storage.filled != past.length or sealed:
        # No room, not to be written outside of inference mode, or another cache has already gone on from here: continue
        # in storage of our own.
        every = torch.arange(past.batch, device=like.device)
        past = _copied(past, config, every, rounded_up(length, _BLOCK), like)
    past._storage.filled = length
    return XGLMCache(past._storage, past.length, length, past.encoder.copy(), *masks)


def reordered(cache: XGLMCache, config: XGLMConfig, rows: torch.Tensor) -> XGLMCache:
    """A cache of these rows of another one, integers [new rows], with room for as many positions."""
    held = cache._storage.keys[0]
    return _copied(cache, config, rows, held.shape[2], like=held)


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
    return XGLMCache(_Storage(keys, values, length), length, length, cache.encoder, mask, cache.encoder_mask)


def _copied(cache: XGLMCache, config: XGLMConfig, rows: torch.Tensor, capacity: int, like: torch.Tensor) -> XGLMCache:
    """A cache of these rows of another one, in storage of its own, of the type and on the device of `like`."""
    old, new = cache._storage, empty_cache(config, len(rows), capacity, like)._storage
    for held, theirs in zip(new.keys + new.values, old.keys + old.values, strict=True):
        held[:, :, : cache.length] = theirs[rows.to(theirs.device), :, : cache.length]
    new.filled = cache.length
    encoder = [tuple(part[rows.to(part.device)] for part in parts) for parts in cache.encoder]
    masks = (None if mask is None else mask[rows.to(mask.device)] for mask in (cache.mask, cache.encoder_mask))
    return XGLMCache(new, cache.length, cache.length, encoder, *masks)


def _full_cache(layers: Sequence[Sequence[torch.Tensor]], **masks: torch.Tensor) -> XGLMCache:
    """A cache of given tensors, as `XGLMCache.__getitem__` returns them. Nothing is ever written into them."""
    keys, values, length = [layer[0] for layer in layers], [layer[1] for layer in layers], layers[0][0].shape[2]
    return XGLMCache(_Storage(keys, values, length), length, length, [tuple(layer[2:]) for layer in layers], **masks)


def _flattened(cache: XGLMCache) -> tuple[list[Any], list[str]]:
    masks = {name: mask for name in ("mask", "encoder_mask") if (mask := getattr(cache, name)) is not None}
    return [tuple(cache), *masks.values()], list(masks)


def _unflattened(children: Any, names: list[str]) -> XGLMCache:
    layers, *masks = children
    return _full_cache(layers, **dict(zip(names, masks, strict=True)))


# What `torch.export` and others need to know of a class that a model takes or returns.
register_pytree_node(XGLMCache, _flattened, _unflattened, serialized_type_name="xglm_torch.XGLMCache")
