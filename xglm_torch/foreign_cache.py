"""Caches of transformers in place of ours. They are known by their methods, as that package is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xglm_torch.cache import XGLMCache


def without_foreign(past_key_values: Any) -> Any:
    """Of a cache of transformers the key and value of each layer, as far as it is filled; None if it is empty.

    Anything else as it is.
    """
    if not _is_foreign(past_key_values):
        return past_key_values
    length = int(past_key_values.get_seq_length())
    if hasattr(past_key_values, "layers"):
        layers = [(layer.keys, layer.values) for layer in past_key_values.layers]
    else:  # Before transformers 4.54.
        layers = past_key_values.to_legacy_cache()
    return tuple((key[:, :, :length], value[:, :, :length]) for key, value in layers) if length else None


def update_foreign(given: Any, cache: XGLMCache | None) -> None:
    """Gives the new positions of a cache to what a call was given in its place, as each call does in transformers."""
    if cache is not None and _is_foreign(given):
        for index, (key, value, *_) in enumerate(cache):
            given.update(key[:, :, cache.past :], value[:, :, cache.past :], index)


def _is_foreign(past_key_values: Any) -> bool:
    """Whether it is a cache of transformers."""
    has_layers = hasattr(past_key_values, "layers") or hasattr(past_key_values, "to_legacy_cache")
    return has_layers and hasattr(past_key_values, "get_seq_length") and hasattr(past_key_values, "update")
