"""Between a checkpoint and the model's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from xglm_core.checkpoint import gathering
from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FLOAT32, FloatType
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.checkpoint.tensor_file import aligned_empty, copy_values
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import WeightSpec
from xglm_flax.initialization import draw
from xglm_flax.stacking import is_stacked

# Differs: in PyTorch and Keras modules hold them. Here they are a tree: params["model"]["layers"]["3"]["fc1"]["bias"].
Params = dict[str, Any]

_NAMED = 5  # How many parameters of a kind an error names.


def load_weights(specs: Iterable[WeightSpec], plan: LoadPlan) -> Params:
    """Reads the parameters one by one to the default device: into memory of their own, or see `LoadPlan.aligned`.

    Args:
        specs: the model's weights.
        plan: the checkpoint.
    """
    # Differs: PyTorch takes views of the file. Here kernels are the transposes of what most files hold: copies.
    leaves = {spec.flax: _to_jax(plan.aligned(spec, transposed=spec.transposed), plan.dtype) for spec in specs}
    params: Params = unflatten_dict(leaves)
    return params


def initial_params(
    config: XGLMConfig, specs: Sequence[WeightSpec], rng: jax.Array, dtype: Any, given: Params
) -> Params:
    """Draws the parameters that are not given.

    Args:
        config: the architecture.
        specs: the model's weights.
        rng: a key of `jax.random`.
        dtype: type of the parameters that are drawn.
        given: parameters to keep, or an empty tree; it is left alone.
    """
    leaves = dict(flatten_dict(given))
    for spec, key in zip(specs, jax.random.split(rng, len(specs)), strict=True):
        if leaves.get(spec.flax) is None:
            leaves[spec.flax] = draw(spec, config, key, dtype)
    params: Params = unflatten_dict(leaves)
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
    return set_parameter(params, spec.flax, _to_jax(copy, dtype))


def weights_dtype(params: Params, spec: WeightSpec | None = None) -> FloatType:
    """The type of a parameter, or one that holds all of them, as users may cast a part of the tree."""
    leaves = jax.tree.leaves(params) if spec is None else [get_parameter(params, spec)]
    names = {str(leaf.dtype) for leaf in leaves}
    return DTYPES[names.pop()] if len(names) == 1 else FLOAT32


def get_parameter(params: Params, spec: WeightSpec) -> jax.Array:
    """A parameter as it is in the tree; its part of one that is stacked."""
    tree: Any = params
    index = None
    for key in spec.flax:
        if key.isdecimal() and is_stacked(tree):
            index = int(key)
        else:
            tree = tree[key]
    return tree if index is None else tree[index]


def set_parameter(tree: Any, path: Sequence[str], value: Any) -> Any:
    """A new tree with another leaf at a path; `tree` is left alone."""
    if not path:
        return value
    return {**tree, path[0]: set_parameter(tree.get(path[0], {}), path[1:], value)}


def first_process_reads(
    params: Params, names: Sequence[str], read: gathering.Read
) -> contextlib.AbstractContextManager[gathering.Read | None]:
    """How to read parameters: `read`; those spread over processes, in the first one alone, see `gathering`."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(params)):
        return contextlib.nullcontext(read)
    return gathering.first_process_reads(read, names, jax.process_index(), _said_by_first)


def _said_by_first(place: int, error: str) -> tuple[int, str]:
    """Differs: PyTorch's processes also send each other the error."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(place))), "its own error says why"


def checked_params(params: Any, specs: Iterable[WeightSpec]) -> Params:
    """Parameters as plain dictionaries, once it is certain that they are those of a model, one by one or stacked.

    Only names and shapes are looked at, so shapes may stand in for arrays.

    Args:
        params: the tree.
        specs: the model's weights.

    Raises:
        InputError: parameters are missing, unexpected or of another shape; all of them are counted, the first named.
    """
    if not isinstance(params, Mapping):
        raise InputError(f"params is a {type(params).__name__}, expected a tree of parameters, as model.params is")
    given: Any = params
    tree: Params = unfreeze(given)
    found = {"/".join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}
    in_blocks = {name.partition("layers/")[2][:1] for name in found} - {""}
    stacked = bool(in_blocks) and not any(map(str.isdecimal, in_blocks))
    expected = {"/".join(path): shape for path, shape in param_shapes(specs, stacked=stacked).items()}
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


def param_shapes(specs: Iterable[WeightSpec], *, stacked: bool = False) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each parameter by its path; or of those of `stack_layers`."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for spec in specs:
        path, shape = path_in_tree(spec, stacked=stacked), spec.shape[::-1] if spec.transposed else spec.shape
        # In a stack, the last block tells how many there are.
        shapes[path] = shape if path == spec.flax else (int(spec.flax[spec.flax.index("layers") + 1]) + 1, *shape)
    return shapes


def path_in_tree(spec: WeightSpec, *, stacked: bool) -> tuple[str, ...]:
    """The keys that lead to a parameter; those of blocks that are stacked have no index."""
    if not stacked or "layers" not in spec.flax:
        return spec.flax
    index = spec.flax.index("layers") + 1
    return spec.flax[:index] + spec.flax[index + 1 :]


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


def _to_jax(array: np.ndarray, dtype: FloatType) -> jax.Array:
    """An aligned array on the default device."""
    if dtype is BFLOAT16:
        array = array.view(jnp.dtype("bfloat16"))
    # On a CPU, JAX takes over what is aligned well; anything else it would copy once more. Waiting until the copy to
    # another device is done keeps two arrays from lying in memory at once.
    return jax.block_until_ready(jax.device_put(array))
