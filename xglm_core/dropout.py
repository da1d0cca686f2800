"""Dropout decided by 16 random bits for each number, where a framework would draw 32 or more."""

from __future__ import annotations

BITS = 16


def drop_level(rate: float) -> tuple[int, float]:
    """What is dropped, and how the rest makes up for it.

    Args:
        rate: drop probability in [0, 1]. It is rounded to a multiple of 2**-16.

    Returns:
        How many of the 2**16 values of the bits mean that a number is dropped: the lowest ones. And the factor of the
        numbers that stay, with which the mean of each number remains what it was.
    """
    values = 2**BITS
    if rate >= 1:
        return values, 0.0
    level = min(round(rate * values), values - 1)
    return level, values / (values - level)
