"""Between a checkpoint and the model's parameters."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from xglm_core.checkpoint.dtypes import BFLOAT16, DTYPES, FloatType
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.checkpoint.mapped import copy_numbers


def load_weights(model: nn.Module, plan: LoadPlan) -> None:
    """Gives each parameter of a model on the meta device its stored value.

    A parameter whose type is the file's is a copy-on-write view of the mapped file: it costs no memory until it is
    read, and writing into it does not change the file.

    Args:
        model: a model on the meta device.
        plan: the checkpoint, whose weights are the model's.
    """
    for spec in plan.specs:
        module, name = _owner(model, spec.name)
        array = plan.read(spec)
        # Differs: the layout is that of most files. What a file has transposed or not aligned is copied.
        if not (array.flags.c_contiguous and array.flags.aligned):
            stored, array = array, np.empty(array.shape, array.dtype)
            copy_numbers(array, stored)
            plan.release(spec)
        setattr(module, name, nn.Parameter(_from_numpy(array, plan.dtype)))


def read_weight(model: nn.Module, name: str, dtype: FloatType) -> np.ndarray:
    """A parameter by canonical name, in canonical shape and in `dtype.storage`; gathered if it is sharded."""
    module, parameter = _owner(model, name)
    tensor = getattr(module, parameter).detach()
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
    new = _from_numpy(np.ascontiguousarray(value), weights_dtype(model)).clone().to(old.device)
    setattr(module, parameter, nn.Parameter(new, requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = len(new)


def weights_dtype(model: nn.Module) -> FloatType:
    """The type of the model's parameters."""
    return DTYPES[str(next(model.parameters()).dtype).removeprefix("torch.")]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its attribute name there."""
    path, _, parameter = name.rpartition(".")
    # The bare decoder is what causal-LM names call "model".
    return model.get_submodule(path if hasattr(model, "model") else path.removeprefix("model.")), parameter


def _from_numpy(array: np.ndarray, dtype: FloatType) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype is BFLOAT16 else tensor
