"""Between a checkpoint and the model's variables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FloatType, convert
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.weight_names import WeightSpec

Initializer = Callable[..., tf.Tensor]

_ALIGNMENT = 64  # Bytes. TensorFlow copies memory that is aligned to less.


def load_weights(model: keras.Model, plan: LoadPlan) -> None:
    """Creates each variable of a model with its stored value, one by one in the order of the file.

    Args:
        model: a model that is not built.
        plan: the checkpoint, whose weights are the model's.
    """
    for spec in plan.specs:
        set_initializer(model, spec, functools.partial(_stored_value, plan, spec))
    model.build()
    for spec in plan.specs:
        set_initializer(model, spec, None)  # Else they would keep the file open.


def set_initializer(model: keras.Model, spec: WeightSpec, initializer: Initializer | None) -> None:
    """Sets what will give a variable its first value."""
    layer, variable = _owner(model, spec)
    setattr(layer, f"{variable}_initializer", initializer)


def read_weight(model: keras.Model, spec: WeightSpec, dtype: FloatType) -> np.ndarray:
    """A variable in canonical shape and in `dtype.storage`."""
    layer, variable = _owner(model, spec)
    array = getattr(layer, variable).numpy()
    source = weights_dtype(model)
    stored = convert(array.view(source.storage), source, dtype)
    return stored.T if spec.transposed else stored


def weights_dtype(model: keras.Model) -> FloatType:
    """The type of the model's variables."""
    return DTYPES[model.variable_dtype]


def _owner(model: keras.Model, spec: WeightSpec) -> tuple[keras.layers.Layer, str]:
    """The layer that holds a variable, and its attribute name there."""
    owner: Any = model
    for name in spec.name.split(".")[:-1]:
        owner = owner[int(name)] if name.isdecimal() else getattr(owner, name)
    return owner, spec.keras.rpartition("/")[2]


def _stored_value(plan: LoadPlan, spec: WeightSpec, shape: tuple[int, ...], dtype: Any) -> tf.Tensor:
    """The value of a weight in a variable's layout, in memory that the variable will take over."""
    stored = plan.read(spec)
    memory = np.empty(stored.nbytes + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    value = memory[begin : begin + stored.nbytes].view(stored.dtype).reshape(shape)
    np.copyto(value, stored.T if spec.transposed else stored)
    plan.release(spec)
    tensor = tf.experimental.dlpack.from_dlpack(value.__dlpack__())
    return tf.bitcast(tensor, tf.bfloat16) if plan.dtype is BFLOAT16 else tensor
