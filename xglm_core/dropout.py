"""Dropout by 16 random bits per element, where frameworks draw 32 or more."""

from __future__ import annotations

BITS = 16


def drop_level(rate: float) -> tuple[int, float]:
    """The threshold and the scale of dropout by 16-bit draws.

    Args:
        rate: drop probability in [0, 1]. It is rounded to a multiple of 2**-16.

    Returns:
        The threshold below which a 16-bit draw drops an element, and the factor for the elements that stay, which keeps
        the mean.
    """
    values = 2**BITS
    if rate >= 1:
        return values, 0.0
    level = min(round(rate * values), values - 1)
    return level, values / (values - level)
