"""The floating-point types of checkpoint files, in numpy.

numpy has no bfloat16. Its numbers are held as their bit patterns, uint16; a backend reinterprets these without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.errors import InputError


@dataclass(frozen=True)
class FloatType:
    """A floating-point type.

    Attributes:
        name: the name users give, e.g. "bfloat16".
        code: the name in a safetensors header, e.g. "BF16".
        storage: the numpy type that holds it; uint16 bit patterns for bfloat16.
    """

    name: str
    code: str
    storage: np.dtype[Any]


FLOAT32 = FloatType("float32", "F32", np.dtype("<f4"))
FLOAT16 = FloatType("float16", "F16", np.dtype("<f2"))
BFLOAT16 = FloatType("bfloat16", "BF16", np.dtype("<u2"))
FLOAT64 = FloatType("float64", "F64", np.dtype("<f8"))

# What models can have; files can have float64, too.
DTYPES = {dtype.name: dtype for dtype in (FLOAT32, FLOAT16, BFLOAT16)}
STORED = {**DTYPES, FLOAT64.name: FLOAT64}
BY_CODE = {dtype.code: dtype for dtype in STORED.values()}

_BLOCK = 2**16  # Numbers to convert at a time: what is temporary stays small, and within the processor's cache.


def float_type(dtype: Any) -> FloatType:
    """The type that a user names by a string or by a framework's own type (`torch.bfloat16`, `jnp.float32`, ...).

    Raises:
        InputError: it is none of float32, float16, bfloat16.
    """
    # torch.float32, np.dtype("float32"), tf.float32 and jnp.float32 all share the word, somewhere.
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", str(dtype)))
    name = str(name).rpartition(".")[2]
    if name not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def convert(array: np.ndarray, source: FloatType, target: FloatType) -> np.ndarray:
    """Converts stored numbers, rounding to nearest, ties to even; returns `array` itself if the types are equal.

    Numbers beyond the range of `target` become infinite, as in every framework. float64 becomes bfloat16 by way of
    float32, as in PyTorch.
    """
    if source is target:
        return array
    if array.ndim == 2 and array.T.flags.c_contiguous:  # Else reading it in row-major order would copy it first.
        return _convert(array.T, source, target).T
    return _convert(array, source, target)


def _convert(array: np.ndarray, source: FloatType, target: FloatType) -> np.ndarray:
    numbers, result = array.reshape(-1), np.empty(array.size, target.storage)
    for begin in range(0, array.size, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        values = _bfloat16_to_float32(numbers[block]) if source is BFLOAT16 else numbers[block]
        with np.errstate(over="ignore"):
            result[block] = _float32_to_bfloat16(values) if target is BFLOAT16 else values
    return result.reshape(array.shape)


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    # Adding 0x7fff, plus the lowest kept bit, carries into the upper half exactly when rounding goes up.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)
