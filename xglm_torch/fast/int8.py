"""Products with a matrix of int8 and a scale for each row. The plain form makes floats of some of its rows at a time.

The form for few rows is for float32 on processors that multiply integers of 8 bits: each number of the states becomes
three digits of 7 bits, which FBGEMM multiplies as three rows. Sums of integers are exact, so the result is nearly as
good as that of floats: up to 1e-5 of the largest one, beside 1e-6, where one state is 20 times the others. One digit,
as other engines take, would be off by 1e-1 there. With 7 bits no sum of two products has more than 16 bits, which
processors without VNNI instructions need.

Hardware: x86 CPUs, AVX2 or later.
Gain: on two cores of an AMD EPYC (Zen 3, 2026-11-28), 32 steps of one row take 3.9 s, where float32 takes 5.5 s and the
matrices as floats, part by part, 11 s; of eight rows 10.0, 14.7 and 20.7 s. At 16 rows it is as fast as float32.
Command: `xglm bench decode-1 --backend torch --quantization int8`, with and without `XGLM_PLAIN=1`.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from xglm_core.plain import use_plain
from xglm_torch.fast.linear import linear

# Elements of the matrix that are floats at a time: on a CPU they stay in its cache, a GPU would wait for its host.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**20, 2**26
_FEW_ROWS = 16
_PART_ELEMENTS = 2**25  # In FBGEMM's order at a time, as the copies in between take memory.
_ALONE = threading.Lock()  # Filters of warnings are those of all threads.
_ZERO = 64  # What stands for 0 in a digit: FBGEMM takes those from 1 to 127.
_MULTIPLY = "linear_with_input_q_dq_qweight_dq_output_fp32"
_BASE, _LARGEST = 126.0, 63.0  # Digits are from -63 to 63.


class Packed:
    """A matrix of int8 in FBGEMM's order, which the fast form reads in place of the matrix.

    A copy of it is empty, so that layers can be copied and pickled; the plain form takes its place.

    Args:
        weight: int8 [out, in], which must not change.
        release: frees the memory of `weight`, if that is a view of a file.
    """

    def __init__(self, weight: torch.Tensor | None = None, release: Callable[[], None] = lambda: None) -> None:
        self.parts: list[Any] = []
        self.version = -1
        self.release = release
        if weight is not None:
            self.version = weight._version
            for rows in weight.split(max(1, _PART_ELEMENTS // weight.shape[1])):
                with _ALONE, warnings.catch_warnings():  # That PyTorch means to remove them; `can_pack` then says no.
                    warnings.simplefilter("ignore")
                    integers = torch._make_per_tensor_quantized_tensor(rows, 1.0, 0)
                self.parts.append(torch.ops.quantized.linear_prepack(integers, None))
                release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, ()

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether it still holds the numbers of the matrix."""
        return weight._version == self.version


def can_pack() -> bool:
    """Whether the fast form for few rows is there, and not switched off."""
    has_all = hasattr(torch, "_make_per_tensor_quantized_tensor") and hasattr(torch.ops.quantized, _MULTIPLY)
    return has_all and torch.backends.quantized.engine in ("fbgemm", "x86") and not use_plain()


def int8_product(
    states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, packed: Packed | None = None
) -> torch.Tensor:
    """States [..., in] times the matrix int8 [out, in], whose rows have the scales [out, 1]: [..., out]."""
    is_float32 = states.dtype == scale.dtype == torch.float32 and states.is_cpu and weight.is_cpu
    if not is_float32 or torch.is_autocast_enabled("cpu") or use_plain() or not states.numel():
        return plain_product(states, weight, scale)
    rows = states.reshape(-1, states.shape[-1])
    if packed is None or not packed.is_of(weight) or len(rows) > _FEW_ROWS:
        return _by_tiles(states, weight, scale)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
    # Each as an integer with 1, 2 and 3 digits; a digit is what one has more than `_BASE` times the one before.
    integers = (rows * (_powers() / largest)).round_()
    digits = torch.cat([integers[:1], torch.sub(integers[1:], integers[:-1], alpha=_BASE)]).flatten(0, 1)
    multiply = getattr(torch.ops.quantized, _MULTIPLY)
    products = [multiply(digits, 1.0, _ZERO, part).view(3, len(rows), -1) for part in packed.parts]
    sums = [torch.add(high, torch.add(middle, low, alpha=1 / _BASE), alpha=1 / _BASE) for high, middle, low in products]
    whole = sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)
    return (whole * (largest / _LARGEST)).mul_(scale[:, 0]).view(*states.shape[:-1], -1)


def plain_product(states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`int8_product` on any device, in any type."""
    step = rows_at_a_time(weight)
    parts = zip(weight.split(step), scale.split(step), strict=True)
    return torch.cat([F.linear(states, rows.to(scale.dtype) * scales) for rows, scales in parts], dim=-1)


def _by_tiles(states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The plain form, with the library that is faster, and one piece of memory for all parts."""
    # Of many rows, a larger part of the matrix is read several times, so that it pays to begin fewer products.
    step = rows_at_a_time(weight) * (4 if states.numel() > 32 * states.shape[-1] else 1)
    tile = torch.empty(min(step, len(weight)), weight.shape[1])
    products = [linear(states, tile[: len(rows)].copy_(rows)) for rows in weight.split(step)]
    whole = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    return whole.mul_(scale[:, 0])


def rows_at_a_time(weight: torch.Tensor) -> int:
    """How many rows of a matrix are floats at a time."""
    return max(1, (_CPU_ELEMENTS if weight.is_cpu else _GPU_ELEMENTS) // weight.shape[1])


@functools.cache
def _powers() -> torch.Tensor:
    """What makes numbers up to 1 integers with 1, 2 and 3 digits, [3, 1, 1]."""
    return torch.tensor([_LARGEST, _LARGEST * _BASE, _LARGEST * _BASE**2], device="cpu")[:, None, None]
