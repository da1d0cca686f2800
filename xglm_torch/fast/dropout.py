"""Dropout by 16 random bits for each element of a CPU tensor. The plain form is `torch.native_dropout`.

Hardware: any CPU. PyTorch draws 32 bits for each element there, one after the other.
Gain: a mask takes a fifth of the time, and a byte of each element is kept where PyTorch keeps four (2026-11-26).
Command: `python bench/speed.py torch train CHECKPOINT`, with and without `XGLM_PLAIN=1`.
"""

from __future__ import annotations

import math

import torch

from xglm_core.dropout import BITS, drop_level
from xglm_core.plain import use_plain
from xglm_torch.recording import is_transformed


def dropped(states: torch.Tensor, rate: float) -> torch.Tensor:
    """Dropout, as `F.dropout`, which on a CPU keeps four bytes of each element for the gradient where this keeps one.

    Args:
        states: of any shape and type.
        rate: drop probability in [0, 1]; for a CPU see `drop_level`.
    """
    if not rate:
        return states
    if not draws_bits(states, rate):
        return torch.native_dropout(states, rate, True)[0]
    kept, factor = random_mask(states, rate)
    return (states * kept).mul_(factor)


def draws_bits(states: torch.Tensor, rate: float) -> bool:
    """Whether masks are drawn here: not for what means something else, such as a DTensor."""
    plain = type(states) is torch.Tensor and states.device.type == "cpu"
    return plain and rate < 1 and not (torch.compiler.is_compiling() or is_transformed() or use_plain())


def random_mask(like: torch.Tensor, rate: float) -> tuple[torch.Tensor, float]:
    """Which elements stay, bool in the shape of `like`, and what to multiply them by."""
    level, factor = drop_level(rate)
    draws = torch.empty(math.ceil(like.numel() / 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: like.numel()] >= level - 2 ** (BITS - 1)
    return kept.view(like.shape), factor
