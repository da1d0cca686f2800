"""How parameters and batches are spread over a mesh of devices, with the axes "data" and "tensor".

Each group of devices along "data" computes some rows of the batch. Within a group, "tensor" divides the heads, the
feed-forward units and the vocabulary, see `xglm_core.parallel`. XLA adds the communication between devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.parallel import check_tensor_parallel, split_dimension
from xglm_core.weight_names import WeightSpec, weight_specs
from xglm_flax.stacking import is_stacked
from xglm_flax.weights import Params, path_in_tree

DATA, TENSOR = "data", "tensor"


def make_mesh(data: int, tensor: int = 1) -> Mesh:
    """A mesh of all devices, of all processes: `data` groups, each of `tensor` devices.

    Raises:
        InputError: there are more or fewer devices.
    """
    if data * tensor != jax.device_count() or data < 1:
        raise InputError(
            f"a mesh of {data}x{tensor} needs {data * tensor} devices, but there are {jax.device_count()}; "
            "choose sizes whose product that is"
        )
    return jax.make_mesh((data, tensor), (DATA, TENSOR), **_automatic(2))


def partition_specs(config: XGLMConfig, *, stacked: bool = False, bare: bool = False) -> dict[str, Any]:
    """Which axis of each parameter is divided, as a tree of `PartitionSpec` like that of the parameters.

    Args:
        config: the architecture.
        stacked: whether the tree is that of `stack_layers`.
        bare: whether it is that of the bare decoder.
    """
    leaves = {}
    for spec in weight_specs(config, with_head=not (bare or config.tie_word_embeddings), bare=bare):
        path = path_in_tree(spec, stacked=stacked)
        leaves[path] = PartitionSpec(*(None,) * (len(spec.flax) - len(path)), *_axes(spec))
    tree: dict[str, Any] = unflatten_dict(leaves)
    return tree


def specs_like(tree: Any, params: Params, config: XGLMConfig) -> Any:
    """The `PartitionSpec` of each leaf of a tree that has something for each parameter, as an optimizer's state has.

    A leaf is divided like the parameter whose path its own path ends with, if it has that parameter's shape, perhaps
    after further axes. So optimizers may wrap, mask and divide the parameters. All other leaves are on all devices.
    `tree` may hold shapes in place of arrays.
    """
    layers = params.get("model", params).get("layers", {})
    specs = partition_specs(config, stacked=is_stacked(layers), bare="model" not in params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    known = {
        _names(path): (leaf.shape, spec) for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    }

    def of(path: Any, leaf: Any) -> PartitionSpec:
        names = _names(path)
        for begin in range(len(names)):
            shape, spec = known.get(names[begin:], (None, PartitionSpec()))
            if shape is not None and leaf.shape[len(leaf.shape) - len(shape) :] == shape:
                return PartitionSpec(*(None,) * (len(leaf.shape) - len(shape)), *spec)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(of, tree)


def place_params(params: Params, config: XGLMConfig, mesh: Mesh) -> Params:
    """A copy of the parameters, divided over a mesh.

    Raises:
        InputError: the mesh has other axes, or does not divide the model.
    """
    data_shards(mesh)
    check_tensor_parallel(config, mesh.shape[TENSOR])
    mesh = automatic(mesh)

    def placed(leaf: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        if mesh.is_multi_process:
            # Each process has all of it, and gives its devices their parts.
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
        return jax.device_put(leaf, sharding, may_alias=False)

    return jax.tree.map(placed, params, specs_like(params, params, config))


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays of a batch [rows, ...] with their rows divided over the groups of devices.

    With several processes (`jax.distributed`), each gives its own part of the rows, in the order of the processes.
    Arrays that are spread over devices of several processes already stay as they are.

    Raises:
        InputError: the rows cannot be divided evenly.
    """
    sharding = NamedSharding(automatic(mesh), PartitionSpec(DATA))

    def placed(array: Any) -> jax.Array:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array
        rows, parts = len(array) * jax.process_count(), mesh.shape[DATA]
        if rows % parts:
            raise InputError(f"the batch has {rows} rows, expected a multiple of {parts}, the groups of devices")
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return {name: placed(array) for name, array in batch.items()}


def data_shards(mesh: Mesh | None) -> int | None:
    """Among how many groups of devices a mesh divides the rows; None without one.

    Raises:
        InputError: the mesh has other axes.
    """
    if mesh is None:
        return None
    if mesh.axis_names != (DATA, TENSOR):
        raise InputError(
            f"the mesh has the axes {list(mesh.axis_names)}, expected ['{DATA}', '{TENSOR}']; see make_mesh"
        )
    return mesh.shape[DATA]


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with automatic axes: XLA decides what lies where. Those of `jax.make_mesh` are explicit."""
    kinds = _automatic(len(mesh.axis_names))
    if not kinds or mesh.axis_types == kinds["axis_types"]:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, **kinds)


def within(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context for computing on a mesh, in place of a mesh that the user has set for the whole program."""
    enter = getattr(jax, "set_mesh", None)  # JAX 0.5 has none.
    context: contextlib.AbstractContextManager[Any] = (
        contextlib.nullcontext() if mesh is None or enter is None else enter(mesh)
    )
    return context


def _names(path: Any) -> tuple[str, ...]:
    """The keys, attributes and indices that lead to a leaf."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None)))) for entry in path)


def _axes(spec: WeightSpec) -> tuple[str | None, ...]:
    dimension = split_dimension(spec)
    axes = tuple(TENSOR if index == dimension else None for index in range(len(spec.shape)))
    return axes[::-1] if spec.transposed else axes


def _automatic(axes: int) -> dict[str, Any]:
    """Options for automatic axes: JAX 0.5 has no others, later versions have to be told."""
    kinds = getattr(jax.sharding, "AxisType", None)
    return {} if kinds is None else {"axis_types": (kinds.Auto,) * axes}
