"""Between a checkpoint and the model's parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from xglm_core.checkpoint import gathering
from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FLOAT32, INT8, FloatType
from xglm_core.checkpoint.int8 import SCALE, is_matrix
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.checkpoint.tensor_file import copy_values
from xglm_core.errors import InputError
from xglm_core.weight_names import EMBEDDING, HEAD, WeightSpec
from xglm_torch.fast.int8 import Packed, can_pack
from xglm_torch.int8 import Int8Linear, become_int8


def load_weights(model: nn.Module, plan: LoadPlan) -> None:
    """Gives each parameter of a model on the meta device its stored value; matrices may become int8.

    A parameter whose type is the file's is a copy-on-write view of the mapped file: it costs no memory until it is
    read, and writing into it does not change the file.

    Args:
        model: a model on the meta device.
        plan: the checkpoint, whose weights are the model's.
    """
    for spec in plan.specs:
        module, name = _owner(model, spec.name)
        if plan.int8 and is_matrix(spec):
            weight, scale = plan.read_int8(spec)
            become_int8(module, torch.from_numpy(weight), torch.from_numpy(scale).to(getattr(torch, plan.dtype.name)))
            continue
        array = plan.read(spec)
        # Differs: Keras and Flax have transposed kernels. Here what a file has transposed or not aligned is copied.
        if not (array.flags.c_contiguous and array.flags.aligned):
            stored, array = array, np.empty(array.shape, array.dtype)
            copy_values(array, stored)
            plan.release(spec)
        setattr(module, name, nn.Parameter(_from_numpy(array, plan.dtype)))


def pack_weights(model: nn.Module, plan: LoadPlan) -> None:
    """Gives linear layers of int8 the form that is fast for few rows, which takes the place of the file's pages."""
    if not (plan.int8 and plan.dtype is FLOAT32 and can_pack()):
        return
    specs = {local_name(model, spec.name): spec for spec in plan.specs}

    def pack(name: str, layer: Int8Linear) -> None:
        spec = specs.get(f"{name}.weight", specs[local_name(model, EMBEDDING)])  # That of a tied head.
        layer.packed = Packed(layer.weight, functools.partial(plan.release, spec))

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    with ThreadPoolExecutor(2) as pool:  # FBGEMM works in one thread.
        for done in [pool.submit(pack, *layer) for layer in layers]:
            done.result()


def read_weight(model: nn.Module, name: str, dtype: FloatType) -> np.ndarray:
    """A parameter by canonical name, in canonical shape and in `dtype.storage`; gathered if it is sharded."""
    module, parameter = _owner(model, name)
    tensor = getattr(module, parameter)
    return as_array(_offloaded(model, local_name(model, name)) if tensor.is_meta else tensor, dtype)


def as_array(tensor: Any, dtype: FloatType) -> np.ndarray:
    """The elements of a tensor in `dtype.storage`; gathered if it is sharded."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    tensor = tensor.to("cpu", getattr(torch, dtype.name)).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype is BFLOAT16 else tensor.numpy()


def write_weight(model: nn.Module, name: str, value: np.ndarray) -> None:
    """Replaces a parameter by one of another shape, but the same type, device and need of a gradient.

    Args:
        model: the model.
        name: canonical name.
        value: in canonical shape, in the storage type of `weights_dtype`.
    """
    module, parameter = _owner(model, name)
    old = getattr(module, parameter)
    if old.is_meta or parameter not in module._parameters:
        state = "kept elsewhere (accelerate: remove_hook_from_submodules)" if old.is_meta else "adapted or computed"
        raise InputError(
            f"{name} is {state}; change the shapes of a model's weights before that, or after it is undone"
        )
    new = _from_numpy(np.ascontiguousarray(value), weights_dtype(model)).clone().to(old.device)
    setattr(module, parameter, nn.Parameter(new, requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = len(new)


def weights_dtype(model: nn.Module) -> FloatType:
    """The type of the model's parameters."""
    return DTYPES[str(parameters_dtype(model)).removeprefix("torch.")]


def parameters_dtype(model: nn.Module) -> torch.dtype:
    """The type of the model's parameters, but for matrices of int8."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def local_name(model: nn.Module, name: str) -> str:
    """The name of a parameter in the model: the bare decoder is what canonical names call "model"."""
    return name if hasattr(model, "model") else name.removeprefix("model.")


def check_storable(
    model: nn.Module, weights: Mapping[WeightSpec, FloatType], given: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Checks that a checkpoint can hold all weights of a model, or those that are given in their place.

    Args:
        model: the model.
        weights: what the checkpoint has to hold, and the types.
        given: the weights to write in place of the model's.

    Raises:
        InputError: it has no place for one, one is missing, of another shape, or no plain numbers, or a head that
            differs from the embedding would be lost.
    """
    found: Mapping[str, Any] = dict(model.named_parameters(remove_duplicate=False)) if given is None else given
    shapes = {local_name(model, spec.name): spec.shape for spec in weights}
    quantized = {local_name(model, spec.name) for spec, dtype in weights.items() if dtype is INT8}
    heads = {HEAD, HEAD + SCALE}
    table, head = (found.get(local_name(model, name)) for name in (EMBEDDING, HEAD))
    # A parametrized weight is computed, and read as such.
    extra = [
        name
        for name in found
        if name not in {*shapes, *heads} and ".parametrizations." not in name and not name.endswith("_orig")
    ]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise InputError(
            f"a checkpoint has no place for {extra[0]}{more}; merge adapters into the model before (peft: "
            "merge_and_unload), or save them alone (peft: its model's own save_pretrained, get_peft_model_state_dict)"
        )
    if given is not None:
        for name, shape in shapes.items():
            if tuple(getattr(given.get(name), "shape", ())) != tuple(shape):
                actual = list(given[name].shape) if name in given else "missing"
                raise InputError(f"state_dict: {name} is {actual}, expected {list(shape)}; give the whole weights")
    for name, tensor in found.items():
        is_stored = tensor.is_floating_point() or (tensor.dtype == torch.int8 and name in {*quantized, HEAD})
        if not (is_native(tensor) and is_stored):
            raise InputError(
                f"{name} is a {type(tensor).__name__} of {tensor.dtype}, not plain numbers; save the model before it "
                "is quantized, or its state_dict() with torch.save"
            )
    if HEAD not in shapes and head is not None and table is not None and not _same(table, head):
        raise InputError(
            f"{HEAD} differs from the embedding, but config.tie_word_embeddings is True and it would be lost; "
            "set config.tie_word_embeddings=False, or call tie_weights()"
        )


def reshard(model: nn.Module) -> None:
    """Has FSDP release the weights that it gathered for a call, perhaps in another type. Else it does nothing."""
    for module in model.modules():
        release: Any = getattr(module, "reshard", None)
        if release is not None:
            release()


def first_process_reads(
    model: nn.Module, names: Sequence[str], read: gathering.Read
) -> contextlib.AbstractContextManager[gathering.Read | None]:
    """How to read the weights of a model: `read`; of a sharded one, in the first process alone, see `gathering`."""
    if not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return contextlib.nullcontext(read)
    return gathering.first_process_reads(read, names, dist.get_rank(), _said_by_first)


def _said_by_first(place: int, error: str) -> tuple[int, str]:
    message: list[Any] = [place, error]
    dist.broadcast_object_list(message, src=0)
    return message[0], message[1]


def is_native(tensor: torch.Tensor) -> bool:
    """Whether a tensor is PyTorch's own. Those of other packages may store values in their own way, such as quantized.

    Compilers do not follow the names of classes; while they are at work, every tensor counts as native.
    """
    return torch.compiler.is_compiling() or type(tensor).__module__.partition(".")[0] == "torch"


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of a module for a call; None if it keeps none elsewhere."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False) and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return None


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that accelerate keeps elsewhere, while the module has none: in a mapping of the hook that brings it."""
    path = name.split(".")
    for depth in reversed(range(len(path))):
        for hook in _hooks(model.get_submodule(".".join(path[:depth]))):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[".".join(path[depth:])]
    raise InputError(f"{name} is on the meta device and has no numbers; load weights before")


def _hooks(module: nn.Module) -> Sequence[Any]:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _same(table: Any, head: Any) -> bool:
    """Whether a head is its embedding, as far as can be seen here."""
    if table is head or any(tensor.is_meta or hasattr(tensor, "device_mesh") for tensor in (table, head)):
        return True
    return table.data_ptr() == head.data_ptr() or torch.equal(table.to(head.device), head)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its attribute name there."""
    path, _, parameter = local_name(model, name).rpartition(".")
    return model.get_submodule(path), parameter


def _from_numpy(array: np.ndarray, dtype: FloatType) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype is BFLOAT16 else tensor
