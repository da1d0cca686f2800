"""What training does around a block: it computes the block again in the backward pass, or drops it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from xglm_core.calls import DecoderInputs
from xglm_torch.cache import XGLMCache

if TYPE_CHECKING:
    from xglm_torch.decoder import XGLMModel


def run_in_training(
    model: XGLMModel, layer: Any, states: torch.Tensor, cache: XGLMCache | None, inputs: DecoderInputs, *options: bool
) -> Any:
    """What a block returns under gradient checkpointing and layerdrop, if the model has them.

    Args:
        model: the decoder.
        layer, states, cache, inputs, options: a block, and the arguments of its call.
    """

    def run(states: torch.Tensor, *inputs: Any) -> Any:  # Gradients reach tensors that are arguments themselves.
        return layer(states, cache, DecoderInputs(*inputs), *options)

    if model.is_gradient_checkpointing and layer.index % model.gradient_checkpointing_every == 0:
        pinned = states.device.type != "cpu"
        with save_on_cpu(pin_memory=pinned) if model.gradient_checkpointing_offload else contextlib.nullcontext():
            found = checkpoint(run, states, *inputs, **model.gradient_checkpointing_kwargs)
    else:
        found = run(states, *inputs)
    if model.config.layerdrop == 0:
        return found
    # The block runs in any case: so the cache has its keys, each parameter has a gradient, and no graph depends on a
    # draw.
    drops = torch.rand((), device=states.device) < model.config.layerdrop
    return torch.where(drops, states, found[0]), *found[1:]
