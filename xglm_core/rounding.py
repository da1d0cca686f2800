"""Rounding sizes up, so that few shapes occur."""

from __future__ import annotations


def rounded_up(count: int, multiple: int) -> int:
    """The next multiple of `multiple`; `count` may also be an integer tensor."""
    return -(-count // multiple) * multiple


def power_of_two(count: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(count - 1, 0).bit_length()
