"""Checks of a call's arguments.

Values are looked at only where there are any: not while a graph is traced, or under a transform of `torch.func`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

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
from xglm_torch.products import hides_values, is_recorded

_SHORT_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32)


def check_arguments(config: XGLMConfig, past: XGLMCache | None, **arguments: torch.Tensor | None) -> None:
    """Checks which arguments of the decoder are given, their shapes, and the ids.

    Raises:
        InputError: see `xglm_core.inputs`.
    """
    shapes = {name: tensor.shape for name, tensor in arguments.items() if tensor is not None}
    check_shapes(
        config,
        shapes,
        past=0 if past is None else past.length,
        encoder_length=None if past is None else past.encoder_length,
    )
    if past is not None:
        check_cache_batch(past.batch, shapes["input_ids" if "input_ids" in shapes else "inputs_embeds"][0])
    if arguments["input_ids"] is not None:
        check_ids(config, arguments["input_ids"])


def check_ids(config: XGLMConfig, input_ids: torch.Tensor) -> None:
    """Checks that the ids are a matrix and in the vocabulary."""
    if has_values(input_ids):
        check_input_ids(input_ids.numpy(force=True), config)


def check_position_ids(config: XGLMConfig, position_ids: torch.Tensor) -> None:
    """Checks the positions, given or counted."""
    if has_values(position_ids):
        check_positions(int(position_ids.min()), int(position_ids.max()), config)


def check_head_arguments(
    config: XGLMConfig,
    tokens: torch.Tensor | None,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
) -> None:
    """Checks what only the causal language model takes; `tokens` are ids or embeddings, checked elsewhere."""
    if tokens is None:
        return
    if labels is not None:
        check_labels_shape(labels.shape, tokens.shape)
        if has_values(labels):
            check_labels(labels.numpy(force=True), config)
    if not isinstance(logits_to_keep, torch.Tensor):
        check_logits_to_keep(logits_to_keep, tokens.shape[1])
    elif has_values(logits_to_keep):
        check_logits_to_keep(logits_to_keep.numpy(force=True), tokens.shape[1])


def check_trainable(model: nn.Module) -> None:
    """Raises `InputError` if parameters that are to be trained are float16.

    While FSDP computes, its parameters may be, as those that the optimizer sees are others.
    """
    if not torch.compiler.is_compiling() and not hasattr(model, "unshard"):
        for dtype in {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}:
            check_trainable_type(str(dtype).removeprefix("torch."))


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor can be looked at."""
    return not (is_recorded() or hides_values() or tensor.is_meta)


def is_traced(*values: Any) -> bool:
    """Whether this is being compiled, exported or transformed, or some of the values are tensors without values."""
    return is_recorded() or any(isinstance(value, torch.Tensor) and not has_values(value) for value in values)


def as_tensor(model: Any, value: Any) -> Any:
    """A numpy array as a tensor where the model is, and integers in a type that can be an index; another one as it is.

    Differs: in the other backends compiled code takes both.
    """
    if isinstance(value, np.ndarray):
        value = torch.tensor(value, device="cpu" if model.device.type == "meta" else model.device)
    if isinstance(value, torch.Tensor) and value.dtype in _SHORT_INTEGERS:
        value = value.long()
    return value


def as_numpy(array: Any) -> np.ndarray:
    """A tensor or numpy array as an array in the memory of the host; bfloat16, which numpy has not, as float32."""
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    return (array.float() if array.dtype is torch.bfloat16 else array).numpy(force=True)
