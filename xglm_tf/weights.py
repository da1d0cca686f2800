"""Between a checkpoint and the model's variables."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FloatType, convert
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.checkpoint.tensor_file import aligned_empty, copy_values
from xglm_core.weight_names import WeightSpec

Initializer = Callable[..., tf.Tensor]


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
    if getattr(layer, "lora_enabled", False) and variable != "bias":
        array = _merged(layer, variable)
    else:
        array = getattr(layer, variable).numpy()
    source = weights_dtype(model)
    stored = convert(array.view(source.storage), source, dtype)
    return stored.T if spec.transposed else stored


def write_weight(model: keras.Model, spec: WeightSpec, value: np.ndarray) -> None:
    """Replaces a variable by one of another shape, but the same path, place, type and `trainable`.

    Args:
        model: the model.
        spec: which weight; its shape is not looked at.
        value: in canonical shape, in the storage type of `weights_dtype`.
    """
    layer, variable = _owner(model, spec)
    old = getattr(layer, variable)
    array = value.T if spec.transposed else value
    copy = aligned_empty(array.shape, array.dtype)
    copy_values(copy, array)
    tensor = _as_tensor(copy, weights_dtype(model))
    siblings = layer._trainable_variables
    place = [sibling is old for sibling in siblings].index(True)
    # As Keras itself does to quantize a layer that is built.
    with unlocked(layer), name_scopes(layer.path.rpartition("/")[0]):
        layer._untrack_variable(old)
        new = layer.add_weight(name=variable, shape=tensor.shape, initializer=lambda *_, **__: tensor, dtype=old.dtype)
        siblings.insert(place, siblings.pop())
        setattr(layer, f"_{variable}" if hasattr(layer, f"_{variable}") else variable, new)
    new.trainable = old.trainable
    if isinstance(layer, keras.layers.Embedding):
        layer.input_dim = len(value)
    elif spec.transposed:
        layer.units, width = value.shape
        layer.input_spec = keras.InputSpec(min_ndim=2, axes={-1: width})


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Lets a layer that is built have other variables and layers."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


@contextlib.contextmanager
def name_scopes(path: str) -> Iterator[None]:
    """Has variables created with a path below this one."""
    with contextlib.ExitStack() as scopes:
        for name in path.split("/"):
            scopes.enter_context(keras.name_scope(name))
        yield


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer, and all those inside it."""
    return list(layer._flatten_layers())


def weights_dtype(model: keras.Model) -> FloatType:
    """The type of the model's variables."""
    return DTYPES[model.variable_dtype]


def _owner(model: keras.Model, spec: WeightSpec) -> tuple[keras.layers.Layer, str]:
    """The layer that holds a variable, and its attribute name there."""
    owner: Any = model
    for name in spec.name.split(".")[:-1]:
        owner = owner[int(name)] if name.isdecimal() else getattr(owner, name)
    return owner, spec.keras.rpartition("/")[2]


def _merged(layer: keras.layers.Layer, variable: str) -> np.ndarray:
    """A matrix with its adapter, added in float32 and rounded once; Keras' own has the type of the computation."""
    first, second = (getattr(layer, f"lora_{variable}_{part}").numpy() for part in "ab")
    matrix = getattr(layer, f"_{variable}").numpy()
    return (matrix.astype(np.float32) + first @ second * (layer.lora_alpha / layer.lora_rank)).astype(matrix.dtype)


def _stored_value(plan: LoadPlan, spec: WeightSpec, shape: tuple[int, ...], dtype: Any) -> tf.Tensor:
    """The value of a weight, for a variable of this shape and type."""
    return _as_tensor(plan.aligned(spec, transposed=spec.transposed), plan.dtype)


def _as_tensor(value: np.ndarray, dtype: FloatType) -> tf.Tensor:
    """An aligned array as a tensor in the same memory, which a variable will take over."""
    tensor = tf.experimental.dlpack.from_dlpack(value.__dlpack__())
    return tf.bitcast(tensor, tf.bfloat16) if dtype is BFLOAT16 else tensor
