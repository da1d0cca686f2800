"""Between a checkpoint and the model's parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FloatType
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.weight_names import WeightSpec

# Differs: parameters are no part of a module but a tree beside it, as in params["model"]["layers"]["3"]["fc1"]["bias"].
Params = dict[str, Any]


def load_weights(plan: LoadPlan, *, bare: bool) -> Params:
    """Reads the parameters one by one, each into memory of its own on the default device.

    Args:
        plan: the checkpoint.
        bare: whether the tree is that of the bare decoder, without the level "model".
    """
    params: Params = {}
    for spec in plan.specs:
        array = plan.read(spec)
        # Differs: JAX would keep a view of the mapped file, and pay for it when the kernel is multiplied transposed.
        leaf = _to_jax(np.ascontiguousarray(array.T) if spec.transposed else array, plan.dtype)
        owner, name = _owner(params, spec, bare=bare)
        owner[name] = leaf
        plan.release(spec)
    return params


def read_weight(params: Params, spec: WeightSpec, dtype: FloatType) -> np.ndarray:
    """A parameter in canonical shape and in `dtype.storage`."""
    owner, name = _owner(params, spec, bare="model" not in params)
    array = np.asarray(jnp.asarray(owner[name], dtype.name))
    stored = array.view(np.uint16) if dtype is BFLOAT16 else array
    return stored.T if spec.transposed else stored


def weights_dtype(params: Params) -> FloatType:
    """The type of the parameters."""
    return DTYPES[str(jax.tree.leaves(params)[0].dtype)]


def _owner(params: Params, spec: WeightSpec, *, bare: bool) -> tuple[Params, str]:
    """The subtree that holds a parameter, created if it is missing, and the parameter's name there."""
    *path, name = spec.flax[1:] if bare else spec.flax
    for level in path:
        params = params.setdefault(level, {})
    return params, name


def _to_jax(array: np.ndarray, dtype: FloatType) -> jax.Array:
    if dtype is BFLOAT16:
        array = array.view(jnp.dtype("bfloat16"))
    # Waiting keeps `array` from living on beside the next one.
    return jax.block_until_ready(jax.device_put(array, may_alias=False))
