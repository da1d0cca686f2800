"""Rounding sizes up, so that few shapes occur."""

from __future__ import annotations

from typing import Any, TypeVar

_Count = TypeVar("_Count", bound=Any)


def rounded_up(count: _Count, multiple: int) -> _Count:
    """The next multiple of `multiple`, for an integer or an integer tensor."""
    return -(-count // multiple) * multiple  # type: ignore[return-value,operator]


def power_of_two(count: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(count - 1, 0).bit_length()
