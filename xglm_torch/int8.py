"""Layers whose matrix is int8, with a scale for each row: see `xglm_core.checkpoint.int8`.

The matrix is a parameter that needs no gradient, the scales are a buffer in the type of the other parameters. So what
is trained around it, adapters for example, has gradients, and `to(dtype)` changes what is computed in.

Differs: TF and Flax make floats of such a matrix when they load it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.errors import InputError
from xglm_torch.fast.int8 import Packed, int8_product, rows_at_a_time
from xglm_torch.recording import is_watched


class Int8Linear(nn.Linear):
    """A linear layer with `weight`, int8 [out, in], and `weight_scale` [out, 1]. See `become_int8`.

    Attributes:
        packed: the matrix as the fast form for few rows reads it, or None.
    """

    weight_scale: torch.Tensor
    packed: Packed | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        product = int8_linear(states, self.weight, self.weight_scale, self.bias, self.packed)
        self.release()
        return product

    def release(self) -> None:
        """Frees the memory of the matrix, if that is a view of a file and there is another form of it."""
        if self.packed is not None and self.packed.is_of(self.weight):
            self.packed.release()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves or converts the layer; the fast form is for float32 on a CPU."""
        super()._apply(fn, recurse)
        if not self.weight.is_cpu or self.weight_scale.dtype != torch.float32:
            self.packed = None
        return self


def become_int8(layer: nn.Module, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Makes a linear layer or an embedding one with a matrix of int8, in place.

    Args:
        layer: the layer; its hooks, name and bias stay.
        weight: int8 [out, in], which other layers may share.
        scale: [out, 1].
    """
    if isinstance(layer, nn.Linear):
        layer.__class__ = Int8Linear
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    layer.register_buffer("weight_scale", scale)


def is_int8(model: nn.Module) -> bool:
    """Whether the matrices of a model are int8."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def refuse_int8(model: nn.Module, action: str) -> None:
    """Raises an `InputError` if the matrices of a model are int8, which an action cannot work on."""
    if is_int8(model):
        raise InputError(
            f"{action} needs floats, and the matrices of this model are int8; do it with the checkpoint of floats, and "
            "quantize the result"
        )


def int8_linear(
    states: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """`F.linear` with a matrix of int8 whose rows have scales. Only the states and the bias have gradients."""
    if is_watched():
        return F.linear(states, weight.to(scale.dtype) * scale, bias)
    if torch.is_grad_enabled() and states.requires_grad:
        product = _Product.apply(states, weight, scale, packed)
    else:
        product = int8_product(states, weight, scale, packed)
    return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    """The product without its bias; nothing but the int8 matrix is kept for the gradient of the states."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, packed: Packed | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return int8_product(states, weight, scale, packed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        total = grad.new_zeros(*grad.shape[:-1], weight.shape[1])
        step = rows_at_a_time(weight)
        for begin in range(0, len(weight), step):
            rows = slice(begin, begin + step)
            total += grad[..., rows] @ (weight[rows].to(grad.dtype) * scale[rows].to(grad.dtype))
        return total, None, None, None
