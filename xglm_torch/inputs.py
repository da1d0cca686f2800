"""Checks of a call's arguments.

They look at values only where there are any: not while a graph is traced, or under a transform of `torch.func`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from xglm_core.calls import DecoderInputs
from xglm_core.config import XGLMConfig
from xglm_core.inputs import (
    check_cache_batch,
    check_input_ids,
    check_labels,
    check_labels_shape,
    check_logits_to_keep,
    check_positions,
    check_shapes,
)
from xglm_core.loss import check_trainable_type
from xglm_torch.cache import XGLMCache
from xglm_torch.recording import hides_values, is_recorded

Forward = TypeVar("Forward", bound=Callable[..., Any])

_SHORT_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32)


def with_inner_door(forward: Forward) -> Forward:
    """Has the call of a model lead to its method `decode`, past all checks, if it is given `DecoderInputs`.

    It is the module's own call for the sake of what acts on such calls: hooks, FSDP, which gathers parameters for them,
    accelerate, and compilers.

    Differs: TF's decoder is a layer of its own, and Flax' module has the method `decode`.
    """

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and type(args[0]) is DecoderInputs:
            return self.decode(*args)
        return forward(self, *args, **kwargs)

    call.has_inner_door = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def has_inner_door(model: Any) -> bool:
    """Whether the model's call is ours: a subclass may have another one, which takes the public arguments alone.

    Differs: in TF and Flax, engines never go through the public call.
    """
    return hasattr(type(model).forward, "has_inner_door")


def check_arguments(config: XGLMConfig, inputs: DecoderInputs, past: XGLMCache | None) -> None:
    """Checks which arguments of the decoder are given, their shapes, the ids, and the positions, given or counted.

    Raises:
        InputError: see `xglm_core.inputs`.
    """
    shapes = {name: tensor.shape for name, tensor in zip(inputs._fields, inputs, strict=True) if tensor is not None}
    start, encoder_length = (0, None) if past is None else (past.length, past.encoder_length)
    check_shapes(config, shapes, past=start, encoder_length=encoder_length)
    batch, length = shapes["input_ids" if "input_ids" in shapes else "inputs_embeds"][:2]
    if past is not None:
        check_cache_batch(past.batch, batch)
    if is_traced(*inputs):
        return
    if inputs.input_ids is not None:
        check_input_ids(inputs.input_ids.numpy(force=True), config)
    positions = inputs.position_ids
    if positions is not None:
        check_positions(int(positions.min()), int(positions.max()), config)
    elif start + length > config.max_position_embeddings:
        check_positions(0, _count_tokens(inputs.attention_mask, past, start + length) - 1, config)


def _count_tokens(attention_mask: torch.Tensor | None, past: XGLMCache | None, length: int) -> int:
    """How many of the positions of a row hold tokens, of the row that has most."""
    if attention_mask is not None:
        return int((attention_mask != 0).sum(dim=1).max())
    if past is None or past.mask is None:
        return length
    return int(past.mask.sum(dim=1).max()) + length - past.length


def check_head_arguments(
    model: Any, inputs: DecoderInputs, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor
) -> None:
    """Checks what only the causal language model takes; the rest of the inputs is checked elsewhere."""
    tokens = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
    if tokens is None:
        return
    if labels is not None:
        check_labels_shape(labels.shape, tokens.shape)
        if has_values(labels):
            check_labels(labels.numpy(force=True), model.config)
        if model.training:
            check_trainable(model)
    if not isinstance(logits_to_keep, torch.Tensor):
        check_logits_to_keep(logits_to_keep, tokens.shape[1])
    elif has_values(logits_to_keep):
        check_logits_to_keep(logits_to_keep.numpy(force=True), tokens.shape[1])


def check_trainable(model: nn.Module) -> None:
    """Raises `InputError` if parameters that are to be trained are float16.

    While FSDP computes, its parameters may be, as those that the optimizer sees are others.

    Differs: TF checks this in `compile`, and Flax in `make_train_step`.
    """
    if not torch.compiler.is_compiling() and not hasattr(model, "unshard"):
        for dtype in {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}:
            check_trainable_type(str(dtype).removeprefix("torch."))


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor can be looked at."""
    return not (is_recorded() or hides_values() or tensor.is_meta)


def is_traced(*values: Any) -> bool:
    """Whether this is being compiled, exported or transformed, or some of the values are tensors without values.

    Differs: Flax has this in `cache.py`, where it is also needed.
    """
    return is_recorded() or any(isinstance(value, torch.Tensor) and not has_values(value) for value in values)


def as_tensor(model: Any, value: Any) -> Any:
    """Makes a numpy array a tensor where the model is, and widens integers that cannot be an index.

    Differs: `xglm_tf` and `xglm_flax` need no such step, as their compiled code takes numpy arrays and short integers.
    """
    if isinstance(value, np.ndarray):
        value = torch.tensor(value, device="cpu" if model.device.type == "meta" else model.device)
    if isinstance(value, torch.Tensor) and value.dtype in _SHORT_INTEGERS:
        value = value.long()
    return value


def as_numpy(array: Any) -> np.ndarray:
    """A tensor or numpy array as a numpy array; bfloat16, which numpy lacks, becomes float32.

    Differs: numpy reads the tensors of TF and JAX by itself.
    """
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    return (array.float() if array.dtype is torch.bfloat16 else array).numpy(force=True)
