"""Between a checkpoint and the model's parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FLOAT32, FloatType
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.checkpoint.tensor_file import aligned_empty, copy_values
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import WeightSpec
from xglm_flax.initialization import initializer_of
from xglm_flax.stacking import is_stacked

# Differs: in PyTorch and Keras modules hold them. Here they are a tree: params["model"]["layers"]["3"]["fc1"]["bias"].
Params = dict[str, Any]

_NAMED = 5  # How many parameters of a kind an error names.


def load_weights(plan: LoadPlan, *, bare: bool) -> Params:
    """Reads the parameters one by one to the default device: into memory of their own, or see `LoadPlan.aligned`.

    Args:
        plan: the checkpoint.
        bare: whether the tree is that of the bare decoder, without the level "model".
    """
    params: Params = {}
    for spec in plan.specs:
        # Differs: PyTorch takes views of the file. Here kernels are the transposes of what most files hold: copies.
        array = plan.aligned(spec, transposed=spec.transposed)
        *path, name = _path(spec, bare=bare)
        owner = functools.reduce(lambda tree, key: tree.setdefault(key, {}), path, params)
        owner[name] = _to_jax(array, plan.dtype)
    return params


def initial_params(
    config: XGLMConfig, specs: Sequence[WeightSpec], rng: jax.Array, dtype: Any, given: Params, *, bare: bool
) -> Params:
    """Draws the parameters that are not given.

    Args:
        config: the architecture.
        specs: the model's weights.
        rng: a key of `jax.random`.
        dtype: type of the parameters that are drawn.
        given: parameters to keep, or an empty tree; it is left alone.
        bare: whether the tree is that of the bare decoder, without the level "model".
    """
    initializer = initializer_of(config)
    params = given
    for spec, key in zip(specs, jax.random.split(rng, len(specs)), strict=True):
        path = _path(spec, bare=bare)
        if _find(given, path) is None:
            shape = spec.shape[::-1] if spec.transposed else spec.shape
            params = _replaced(params, path, initializer(spec)(key, shape, dtype))
    return params


def read_weight(params: Params, spec: WeightSpec, dtype: FloatType | None = None) -> np.ndarray:
    """A parameter in canonical shape and in `dtype.storage`; None means its own type.

    If it lies in several processes, all of them have to call this.
    """
    dtype = weights_dtype(params, spec) if dtype is None else dtype
    parameter = jnp.asarray(get_parameter(params, spec), dtype.name)
    array = np.asarray(
        parameter if parameter.is_fully_addressable else multihost_utils.process_allgather(parameter, tiled=True)
    )
    stored = array.view(np.uint16) if dtype is BFLOAT16 else array
    return stored.T if spec.transposed else stored


def write_weight(params: Params, spec: WeightSpec, value: np.ndarray, dtype: FloatType) -> Params:
    """The parameters with one replaced.

    Args:
        params: the parameters, which are left alone.
        spec: which one.
        value: in canonical shape and in `dtype.storage`.
        dtype: the type of its elements.
    """
    array = value.T if spec.transposed else value
    copy = aligned_empty(array.shape, array.dtype)
    copy_values(copy, array)
    return set_parameter(params, spec, _to_jax(copy, dtype))


def weights_dtype(params: Params, spec: WeightSpec | None = None) -> FloatType:
    """The type of a parameter, or one that holds all of them, as users may cast a part of the tree."""
    leaves = jax.tree.leaves(params) if spec is None else [get_parameter(params, spec)]
    names = {str(leaf.dtype) for leaf in leaves}
    return DTYPES[names.pop()] if len(names) == 1 else FLOAT32


def get_parameter(params: Params, spec: WeightSpec) -> jax.Array:
    """A parameter as it is in the tree; its part of one that is stacked."""
    tree: Any = params
    index = None
    for key in _path(spec, bare="model" not in params):
        if key.isdecimal() and is_stacked(tree):
            index = int(key)
        else:
            tree = tree[key]
    return tree if index is None else tree[index]


def set_parameter(params: Params, spec: WeightSpec, value: Any) -> Params:
    """A new tree with another parameter; `params`, with blocks that are not stacked, is left alone."""
    return _replaced(params, _path(spec, bare="model" not in params), value)


def checked_params(params: Any, specs: Sequence[WeightSpec], *, bare: bool) -> Params:
    """Parameters as plain dictionaries, once it is certain that they are those of a model, one by one or stacked.

    Only names and shapes are looked at, so shapes may stand in for arrays.

    Args:
        params: the tree.
        specs: the model's weights.
        bare: whether the model is the bare decoder.

    Raises:
        InputError: parameters are missing, unexpected or of another shape; all of them are counted, the first named.
    """
    if not isinstance(params, Mapping):
        raise InputError(f"params is a {type(params).__name__}, expected a tree of parameters, as model.params is")
    given: Any = params
    tree: Params = unfreeze(given)
    found = {"/".join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}
    before = "layers/" if bare else "model/layers/"
    blocks = [name.removeprefix(before) for name in found if name.startswith(before)]
    expected = param_shapes(specs, bare=bare, stacked=bool(blocks) and not any(name[0].isdecimal() for name in blocks))
    wrong = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} ({list(shape)}, expected {list(expected[name])})"
            for name, leaf in found.items()
            if name in expected and (shape := np.shape(leaf)) != expected[name]
        ],
    }
    if any(wrong.values()):
        told = (
            f"{len(names)} {kind}: {', '.join(names[:_NAMED])}{', ...' * (len(names) > _NAMED)}"
            for kind, names in wrong.items()
            if names
        )
        raise InputError(f"params are not those of this model: {'; '.join(told)}")
    return tree


def param_shapes(specs: Sequence[WeightSpec], *, bare: bool, stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path, "model/layers/0/fc1/bias"; or of those of `stack_layers`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        path, shape = _path(spec, bare=bare), spec.shape[::-1] if spec.transposed else spec.shape
        if stacked and "layers" in path:
            index = path.index("layers") + 1
            count = int(path[index]) + 1  # The last block tells how many there are.
            path, shape = path[:index] + path[index + 1 :], (count, *shape)
        shapes["/".join(path)] = shape
    return shapes


def cast(params: Any, dtype: Any, mask: Any = None) -> Any:
    """A tree of plain dictionaries with floating-point leaves of another type.

    Args:
        params: the tree, which is left alone.
        dtype: the type.
        mask: booleans in a tree of the same structure: which leaves to cast; None means all of them.
    """

    def leaf_cast(leaf: jax.Array, wanted: bool) -> jax.Array:
        return leaf.astype(dtype) if wanted and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    params = unfreeze(params)
    return jax.tree.map(leaf_cast, params, jax.tree.map(lambda _: True, params) if mask is None else unfreeze(mask))


def _find(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf at a path, or None."""
    return functools.reduce(lambda found, key: found.get(key) if found else None, path, tree)


def _replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    return {**tree, key: _replaced(tree.get(key, {}), tuple(rest), value)}


def _path(spec: WeightSpec, *, bare: bool) -> tuple[str, ...]:
    """The keys that lead to a parameter."""
    # The bare decoder is what causal-LM names call "model".
    return spec.flax[1:] if bare else spec.flax


def _to_jax(array: np.ndarray, dtype: FloatType) -> jax.Array:
    """An aligned array on the default device."""
    if dtype is BFLOAT16:
        array = array.view(jnp.dtype("bfloat16"))
    # On a CPU, JAX takes over what is aligned well; anything else it would copy once more. Waiting until the copy to
    # another device is done keeps two arrays from lying in memory at once.
    return jax.block_until_ready(jax.device_put(array))
