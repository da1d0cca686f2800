"""Products with a matrix of int8 and a scale for each row.

The plain form makes floats of a part of the rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Elements of the matrix that are floats at a time: on a CPU they stay in its cache, a GPU would wait for its host.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**20, 2**26


def int8_product(states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """States [..., in] times the matrix int8 [out, in], whose rows have the scales [out, 1]: [..., out]."""
    return plain_product(states, weight, scale)


def plain_product(states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`int8_product` on any device, in any type."""
    step = rows_at_a_time(weight)
    parts = zip(weight.split(step), scale.split(step), strict=True)
    return torch.cat([F.linear(states, rows.to(scale.dtype) * scales) for rows, scales in parts], dim=-1)


def rows_at_a_time(weight: torch.Tensor) -> int:
    """How many rows of a matrix are floats at a time."""
    return max(1, (_CPU_ELEMENTS if weight.is_cpu else _GPU_ELEMENTS) // weight.shape[1])
