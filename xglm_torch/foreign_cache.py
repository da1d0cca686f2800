"""Caches of transformers in place of ours. They are known by their methods, as that package is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from xglm_torch.cache import XGLMCache


def is_foreign(past_key_values: Any) -> bool:
    """Whether it is a cache of transformers."""
    has_layers = hasattr(past_key_values, "layers") or hasattr(past_key_values, "to_legacy_cache")
    return has_layers and hasattr(past_key_values, "get_seq_length") and hasattr(past_key_values, "update")


def foreign_pairs(foreign: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Key and value of each layer of such a cache, as far as it is filled; nothing if it is empty."""
    length = int(foreign.get_seq_length())
    if hasattr(foreign, "layers"):
        layers = [(layer.keys, layer.values) for layer in foreign.layers]
    else:  # Before transformers 4.54.
        layers = foreign.to_legacy_cache()
    return tuple((key[:, :, :length], value[:, :, :length]) for key, value in layers) if length else ()


def update_foreign(given: Any, cache: XGLMCache | None) -> None:
    """Gives the new positions of a cache to what a call was given in its place, as each call does in transformers."""
    if cache is not None and is_foreign(given):
        for index, (key, value, *_) in enumerate(cache):
            given.update(key[:, :, cache.past :], value[:, :, cache.past :], index)
