"""Training on many devices, by PyTorch's own engines: FSDP2, tensor parallelism, and both on a mesh.

Call a sharded model like any other, and always as a whole: weights are there inside `forward`, which computes the loss.
Make the optimizer after sharding. `xglm_core.parallel` says what is split, and how.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

from xglm_core.inputs import IGNORED_LABEL
from xglm_core.parallel import check_tensor_parallel, split_dimension
from xglm_core.weight_names import weight_specs
from xglm_torch.attention import XGLMAttention
from xglm_torch.int8 import refuse_int8
from xglm_torch.loss import counted_labels
from xglm_torch.pretrained import XGLMPreTrainedModel

_STEP = "step-"
_OPTIONS = StateDictOptions(strict=False)  # A tied head is not saved for itself.


def shard_parameters(
    model: XGLMPreTrainedModel, mesh: DeviceMesh | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Splits all parameters, their gradients and so the optimizer's state among devices (FSDP2), in place.

    Each block is gathered when it runs. Embedding, final norm and head form one more group, so a tied matrix stays one.
    Each process computes the loss of rows of its own, and gradients are averaged: see `items_per_process`.

    Args:
        model: with all of its weights, or with those that `split_layers` has left.
        mesh: the devices, in one dimension; None means all processes.
        dtype: what to compute in; parameters and sums of gradients keep theirs. None computes in the parameters' type.
    """
    refuse_int8(model, "shard_parameters")
    policy = MixedPrecisionPolicy() if dtype is None else MixedPrecisionPolicy(dtype, reduce_dtype=model.dtype)
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if model.has_head:
        register_fsdp_forward_method(model, "score")  # It reads decoder and head, but does not call the whole model.


def split_layers(model: XGLMPreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits heads, inner units and the vocabulary among devices that work on the same rows, in place.

    The loss then needs no more than a device's part of the logits. Combine it with `shard_parameters` by calling that
    afterwards, with the other dimension of a mesh.

    Args:
        model: with all of its weights, the same in each process.
        mesh: the devices, in one dimension.

    Raises:
        InputError: the model cannot be divided evenly, or is int8.
    """
    refuse_int8(model, "split_layers")
    config, devices = model.config, mesh.size()
    check_tensor_parallel(config, devices)
    plan: dict[str, ParallelStyle] = {}
    modules = dict(model.named_modules())
    for spec in weight_specs(config, with_head=True):
        layer, _, parameter = (spec.name if model.has_head else spec.name.removeprefix("model.")).rpartition(".")
        dimension = split_dimension(spec)
        if parameter != "weight" or dimension is None or layer not in modules:
            continue
        if isinstance(modules[layer], torch.nn.Embedding):
            plan[layer] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        elif layer == "lm_head":  # Its logits are whole where a call returns them.
            plan[layer] = ColwiseParallel(output_layouts=Replicate())
        else:
            plan[layer] = ColwiseParallel() if dimension == 0 else RowwiseParallel()
    parallelize_module(model, mesh, plan)
    model.tie_weights()  # Each of the two got a parameter of its own.
    model.is_split = model.decoder.is_split = True
    count, rank = config.attention_heads // devices, mesh.get_local_rank()
    for module in model.modules():
        if isinstance(module, XGLMAttention):
            module.heads = module.heads[rank * count : (rank + 1) * count]


def items_per_process(
    labels: torch.Tensor, group: dist.ProcessGroup | None = None, *, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What `num_items_in_batch` must be so that averaged gradients are those of the mean over all processes' labels.

    Args:
        labels: of this process, integers [batch, length], -100 where they do not count.
        group: the processes that have other rows; None means all.
        attention_mask: 1 for tokens, 0 for padding [batch, length], which predicts no label; None means no padding.

    Returns:
        float32 scalar: the number of labels that count, in the mean over the processes.
    """
    count = (counted_labels(labels, attention_mask)[:, 1:] != IGNORED_LABEL).sum().float()
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group)


def save_state(folder: str | os.PathLike[str], step: int, model: XGLMPreTrainedModel, optimizer: Optimizer) -> None:
    """Writes what is needed to go on after `step` steps; each process writes its part.

    Args:
        folder: holds one folder for each step that was saved; complete ones are those that have a file `.metadata`.
        step: how many steps were made.
        model, optimizer: sharded or not.
    """
    save(_state(model, optimizer), checkpoint_id=Path(folder) / f"{_STEP}{step:08d}")


def load_state(folder: str | os.PathLike[str], model: XGLMPreTrainedModel, optimizer: Optimizer) -> int:
    """Reads the last complete state into model and optimizer, which may be sharded otherwise than those it is of.

    Returns:
        How many steps were made; 0, with nothing changed, if there is no complete state.
    """
    steps = sorted(path.parent for path in Path(folder).glob(f"{_STEP}*/.metadata"))
    if not steps:
        return 0
    state = _state(model, optimizer)
    load(state, checkpoint_id=steps[-1])
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    return int(steps[-1].name.removeprefix(_STEP))


def _state(model: XGLMPreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    if model.has_head and model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return {"model": weights, "optimizer": moments}
