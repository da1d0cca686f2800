"""The key/value cache.

A cache is a value: extending it gives a new cache and leaves the old one as it was, so one prompt can be continued in
several ways. Storage is allocated in blocks and written in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from xglm_core.config import XGLMConfig

_BLOCK = 64  # Positions by which storage grows, so that most one-token steps allocate nothing.


class _Storage:
    """The memory that successive caches share: per layer [batch, heads, capacity, head_dim]."""

    def __init__(self, config: XGLMConfig, batch: int, capacity: int, like: torch.Tensor) -> None:
        shape = (config.num_layers, batch, config.attention_heads, capacity, config.head_dim)
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.capacity = capacity
        self.filled = 0  # Positions written so far, by whichever cache went furthest.


class XGLMCache:
    """Keys and values of the positions read so far; also reads as the tuple of per-layer (key, value).

    Attributes:
        length: positions held.
        mask: bool [batch, length], False for padding; None if there is none.
    """

    def __init__(self, storage: _Storage, past: int, length: int, mask: torch.Tensor | None) -> None:
        self._storage = storage
        self._past = past
        self.length = length
        self.mask = mask

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a layer's new keys and values, each [batch, heads, new, head_dim]; returns those of all positions."""
        past, length = self._past, self.length
        keys, values = self._storage.keys[layer], self._storage.values[layer]
        keys[:, :, past:length] = key.detach()
        values[:, :, past:length] = value.detach()
        if past == 0:
            return key, value
        if torch.is_grad_enabled() and key.requires_grad:  # Gradients flow through the new positions only.
            return torch.cat([keys[:, :, :past], key], dim=2), torch.cat([values[:, :, :past], value], dim=2)
        return keys[:, :, :length], values[:, :, :length]

    def __len__(self) -> int:
        return len(self._storage.keys)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of a layer, each [batch, heads, length, head_dim], as views of the cache."""
        return self._storage.keys[layer, :, :, : self.length], self._storage.values[layer, :, :, : self.length]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (self[layer] for layer in range(len(self)))


def empty_cache(config: XGLMConfig, batch: int, capacity: int, like: torch.Tensor) -> XGLMCache:
    """A cache that holds nothing yet, with room for `capacity` positions, of the type and on the device of `like`."""
    return XGLMCache(_Storage(config, batch, capacity, like), past=0, length=0, mask=None)


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
    if storage is None or storage.capacity < length or storage.filled != start:
        # No room, or another cache has already gone on from here: continue in storage of our own.
        fresh = _Storage(config, len(like), -(-length // _BLOCK) * _BLOCK, like)
        if storage is not None:
            fresh.keys[..., :start, :] = storage.keys[..., :start, :]
            fresh.values[..., :start, :] = storage.values[..., :start, :]
        storage = fresh
    storage.filled = length
    return XGLMCache(storage, start, length, mask)
