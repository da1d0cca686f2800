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

from xglm_core import inputs as core
from xglm_core.calls import DecoderInputs
from xglm_core.config import XGLMConfig
from xglm_core.loss import check_trainable_type
from xglm_torch.cache import XGLMCache
from xglm_torch.recording import hides_values, is_recorded

Forward = TypeVar("Forward", bound=Callable[..., Any])

_SHORT_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32)


def with_inner_door(forward: Forward) -> Forward:
    """Has the call of a model lead to its method `decode`, past all checks, if it is given `DecoderInputs`.

    It is the module's own call for the sake of what acts on such calls: hooks, FSDP, which gathers parameters for them,
    accelerate, and compilers.

    Differs: TF has this in the `call` of `TFXGLMDecoderCall`, and Flax' module has the method `decode`.
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
    """See `xglm_core.inputs.check_arguments`. Differs: in Flax `checked_inputs` also fixes their shapes."""
    look = None if is_traced(*inputs) else as_numpy
    core.check_arguments(config, inputs, look, past, 0 if past is None else past.length)


def check_head_arguments(
    model: Any, inputs: DecoderInputs, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor
) -> None:
    """See `xglm_core.inputs.check_head_arguments`; in training, checks the types of the parameters, too."""
    core.check_head_arguments(model.config, inputs, labels, logits_to_keep, _look)
    if labels is not None and model.training:
        check_trainable(model)


def check_trainable(model: nn.Module) -> None:
    """Raises `InputError` if parameters that are to be trained are float16.

    While FSDP computes, its parameters may be, as those that the optimizer sees are others.

    Differs: TF checks this in `compile`, and Flax in `make_train_step`.
    """
    if not torch.compiler.is_compiling() and not hasattr(model, "unshard"):
        for dtype in {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}:
            check_trainable_type(str(dtype).removeprefix("torch."))


def is_traced(*values: Any) -> bool:
    """Whether this is being compiled, exported or transformed, or some of the values are tensors without values.

    Differs: Flax has this in `cache.py`, where it is also needed.
    """
    hidden = is_recorded() or hides_values()
    return hidden or any(isinstance(value, torch.Tensor) and value.is_meta for value in values)


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


def _look(array: Any) -> np.ndarray | None:
    """The values of a tensor; None if they cannot be looked at."""
    return None if is_traced(array) else as_numpy(array)
