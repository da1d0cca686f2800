"""The floating-point types of checkpoint files, in numpy.

numpy has no bfloat16: its values are held as bit patterns, uint16, which a backend reinterprets without a copy. Nor
does numpy have the two types of 8 bits. These can only be read: models do not use them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.errors import InputError


@dataclass(frozen=True)
class FloatType:
    """A floating-point type, or one of `INTEGERS`.

    Attributes:
        name: the name users give, e.g. "bfloat16".
        code: the name in a safetensors header, e.g. "BF16".
        storage: the numpy type that holds its values: bit patterns, uint16 or uint8, for bfloat16 and 8-bit types.
    """

    name: str
    code: str
    storage: np.dtype[Any]


FLOAT32 = FloatType("float32", "F32", np.dtype("<f4"))
FLOAT16 = FloatType("float16", "F16", np.dtype("<f2"))
BFLOAT16 = FloatType("bfloat16", "BF16", np.dtype("<u2"))
FLOAT64 = FloatType("float64", "F64", np.dtype("<f8"))
FLOAT8_E4M3 = FloatType("float8_e4m3", "F8_E4M3", np.dtype("u1"))
FLOAT8_E5M2 = FloatType("float8_e5m2", "F8_E5M2", np.dtype("u1"))

# The types of models. Files may also have float64, and safetensors files the types of 8 bits.
DTYPES = {dtype.name: dtype for dtype in (FLOAT32, FLOAT16, BFLOAT16)}
STORED = {**DTYPES, FLOAT64.name: FLOAT64}
FLOAT8 = (FLOAT8_E4M3, FLOAT8_E5M2)
# The types of tensors that are not weights: counters, masks, lists of positions. int8 is one of weights beside scales.
INT8 = FloatType("int8", "I8", np.dtype("i1"))
INTEGERS = (
    *(FloatType(f"int{8 * size}", f"I{8 * size}", np.dtype(f"<i{size}")) for size in (8, 4, 2)),
    INT8,
    FloatType("uint8", "U8", np.dtype("u1")),
    FloatType("bool", "BOOL", np.dtype("?")),
)
BY_CODE = {dtype.code: dtype for dtype in (*STORED.values(), *FLOAT8, *INTEGERS)}

_BLOCK = 2**16  # Values to convert at a time: temporaries stay in the processor's cache.


def float_type(dtype: Any, types: Mapping[str, FloatType] = DTYPES) -> FloatType:
    """The type that a user names by a string or by a framework's own type (`torch.bfloat16`, `jnp.float32`, ...).

    Raises:
        InputError: it is none of `types`, which are float32, float16, bfloat16.
    """
    # torch.float32, np.dtype("float32"), tf.float32 and jnp.float32 all share the word, somewhere.
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", str(dtype)))
    name = str(name).rpartition(".")[2]
    if name not in types:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(types)}")
    return types[name]


def convert(array: np.ndarray, source: FloatType, target: FloatType) -> np.ndarray:
    """Converts stored values, rounding to nearest, ties to even; returns `array` itself if the types are equal.

    Values beyond the range of `target` become infinite, as in every framework. float64 becomes bfloat16 by way of
    float32, as in PyTorch.
    """
    if source is target:
        return array
    if array.ndim == 2 and array.T.flags.c_contiguous:  # Else reading it in row-major order would copy it first.
        return _convert(array.T, source, target).T
    return _convert(array, source, target)


def overflows(array: np.ndarray, source: FloatType, converted: np.ndarray, target: FloatType) -> bool:
    """Whether the conversion made a finite value infinite."""
    if source is target or source in FLOAT8:  # Their largest value, 57344, is in the range of all types.
        return False
    infinite = _infinite(converted, target)
    return infinite > 0 and infinite > _infinite(array, source)


def _infinite(array: np.ndarray, dtype: FloatType) -> int:
    """How many values are infinite."""
    return int(np.count_nonzero((array & 0x7FFF) == 0x7F80 if dtype is BFLOAT16 else np.isinf(array)))


def _convert(array: np.ndarray, source: FloatType, target: FloatType) -> np.ndarray:
    stored, result = array.reshape(-1), np.empty(array.size, target.storage)
    for begin in range(0, array.size, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        values = _float_values(stored[block], source)
        with np.errstate(over="ignore"):
            result[block] = _float32_to_bfloat16(values) if target is BFLOAT16 else values
    return result.reshape(array.shape)


def _float_values(stored: np.ndarray, dtype: FloatType) -> np.ndarray:
    """The values in a type that numpy has."""
    if dtype is BFLOAT16:  # The upper half of a float32.
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return _float8_values(dtype)[stored] if dtype in FLOAT8 else stored


@functools.cache
def _float8_values(dtype: FloatType) -> np.ndarray:
    """The values of the 256 bit patterns, float32 [256].

    E4M3 has no infinities, and NaN only where all bits but the sign are set; E5M2 is the upper half of a float16.
    """
    bits = np.arange(256, dtype=np.uint8)
    if dtype is FLOAT8_E5M2:
        return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    exponent, mantissa = (bits >> 3 & 0xF).astype(np.float32), (bits & 7).astype(np.float32)
    normal = exponent > 0
    values = np.ldexp(mantissa / 8 + normal, (np.maximum(exponent, 1) - 7).astype(np.int32))
    values[bits & 0x7F == 0x7F] = np.nan
    return np.copysign(values, np.where(bits & 0x80, -1, 1)).astype(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    # Adding 0x7fff, plus the lowest kept bit, carries into the upper half exactly when rounding goes up.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)
