"""Weights of 8 bits: each row of a published matrix [out, in] is a row of integers times one float32 scale.

The scale of a row is its largest absolute value divided by 127, so integers lie between -127 and 127, and 0 stays 0.
All matrices are stored so, the embedding included; a tied head uses the same integers and scales. Biases and norms stay
as they are. In a file, `model.layers.0.fc1.weight` is int8 and `model.layers.0.fc1.weight_scale` float32 [out, 1]; the
key `quantization_config` of `config.json` says so.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from xglm_core.checkpoint.dtypes import FLOAT32, INT8, FloatType, convert
from xglm_core.config import XGLMConfig
from xglm_core.weight_names import WeightSpec

SCALE = "_scale"  # The end of a scale's name, after that of its weight.
CONFIG_KEY = "quantization_config"
METHOD = {"quant_method": "int8", "bits": 8, "symmetric": True, "strategy": "channel"}
_LARGEST = 127


def is_int8(config: XGLMConfig) -> bool:
    """Whether a configuration says that the matrices are stored so."""
    method = getattr(config, CONFIG_KEY, None)
    return isinstance(method, dict) and method.get("quant_method") == METHOD["quant_method"]


def with_method(config: XGLMConfig, *, int8: bool) -> XGLMConfig:
    """A copy that says whether the matrices are stored so."""
    config = copy.copy(config)
    if int8:
        setattr(config, CONFIG_KEY, dict(METHOD))
    elif is_int8(config):
        delattr(config, CONFIG_KEY)
    return config


def is_matrix(spec: WeightSpec) -> bool:
    """Whether a weight is stored so."""
    return len(spec.shape) == 2


def stored_types(
    specs: Sequence[WeightSpec], types: Sequence[FloatType], *, int8: bool
) -> list[tuple[WeightSpec, FloatType]]:
    """What a file holds: the weights with their types and, if matrices are int8, their scales.

    Args:
        specs: the weights.
        types: their types, but for matrices that are int8.
        int8: whether matrices are.
    """
    matrices = [spec for spec in specs if int8 and is_matrix(spec)]
    scales = [WeightSpec(spec.name + SCALE, (spec.shape[0], 1), "", (), transposed=False) for spec in matrices]
    stored = [
        *((spec, FLOAT32) for spec in scales),
        *((spec, INT8 if int8 and is_matrix(spec) else dtype) for spec, dtype in zip(specs, types, strict=True)),
    ]
    # Numbers of 8 bits come last, so that the others begin at multiples of their size.
    return sorted(stored, key=lambda weight: weight[1] is INT8)


def row_scales(rows: np.ndarray) -> np.ndarray:
    """The scales of float32 rows [rows, in]: float32 [rows, 1], positive, or not finite where a row is not."""
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    # Of rows of zeros, any positive scale does. With smaller ones, integers would not fit into 8 bits.
    scales: np.ndarray = np.maximum(largest / np.float32(_LARGEST), np.finfo(np.float32).tiny)
    return scales[:, None]


def converted_by_rows(
    values: np.ndarray, source: FloatType, target: FloatType, scales: np.ndarray | None
) -> np.ndarray:
    """`convert`, also from and to int8, rounding to nearest, ties to even.

    Args:
        values: a part of a matrix, or its transpose; or any other tensor.
        source, target: the types.
        scales: those of its rows, float32, of a shape that can be multiplied; None if neither is int8.
    """
    if scales is None:
        return convert(values, source, target)
    if target is INT8:
        integers: np.ndarray = np.rint(convert(values, source, FLOAT32) / scales)
        return integers.astype(np.int8)
    return convert(np.multiply(values, scales, dtype=np.float32), FLOAT32, target)
