"""Between a checkpoint and the model's parameters."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FloatType
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.weight_names import WeightSpec

# Differs: parameters are no part of a module but a tree beside it, as in params["model"]["layers"]["3"]["fc1"]["bias"].
Params = dict[str, Any]

_ALIGNMENT = 64  # Bytes; what XLA wants of an array that it takes over.


def load_weights(plan: LoadPlan, *, bare: bool) -> Params:
    """Reads the parameters one by one, each into memory of its own on the default device.

    Args:
        plan: the checkpoint.
        bare: whether the tree is that of the bare decoder, without the level "model".
    """
    params: Params = {}
    for spec in plan.specs:
        array = plan.read(spec)
        # Differs: a kernel is the transpose of what the file has, so no parameter is a view of the file.
        *path, name = _path(spec, bare=bare)
        owner = functools.reduce(lambda tree, key: tree.setdefault(key, {}), path, params)
        owner[name] = _to_jax(array.T if spec.transposed else array, plan.dtype)
        plan.release(spec)
    return params


def read_weight(params: Params, spec: WeightSpec, dtype: FloatType) -> np.ndarray:
    """A parameter in canonical shape and in `dtype.storage`."""
    leaf = functools.reduce(operator.getitem, _path(spec, bare="model" not in params), params)
    array = np.asarray(jnp.asarray(leaf, dtype.name))
    stored = array.view(np.uint16) if dtype is BFLOAT16 else array
    return stored.T if spec.transposed else stored


def weights_dtype(params: Params) -> FloatType:
    """The type of the parameters."""
    return DTYPES[str(jax.tree.leaves(params)[0].dtype)]


def _path(spec: WeightSpec, *, bare: bool) -> tuple[str, ...]:
    """The keys that lead to a parameter."""
    # The bare decoder is what causal-LM names call "model".
    return spec.flax[1:] if bare else spec.flax


def _to_jax(array: np.ndarray, dtype: FloatType) -> jax.Array:
    """A copy of an array on the default device."""
    copy = _aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    if dtype is BFLOAT16:
        copy = copy.view(jnp.dtype("bfloat16"))
    # On a CPU, JAX takes over what is aligned well; anything else it would copy once more. Waiting until the copy to
    # another device is done keeps two arrays from lying in memory at once.
    return jax.block_until_ready(jax.device_put(copy))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)
