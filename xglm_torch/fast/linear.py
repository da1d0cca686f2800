"""Float32 products on x86 CPUs through oneDNN, where it is faster than MKL. The plain form of each is `F.linear`.

Hardware: x86 CPUs; which products, `choice.py` measures.
Gain: on an Intel Xeon (Sapphire Rapids, two cores, 2026-11-28) decoding of eight rows takes 6.1 to 6.8 s in place of
9.4 to 9.8. On an AMD EPYC (Zen 3) one row takes 4.8 to 5.1 s in place of 6.5 to 7.2; factors in the other order make
12 tokens of eight rows 4.8 s in place of 5.3, and of two rows 3.2 in place of 4.0. On two cores of another (Zen 5) a
training step of 2 x 256 tokens takes 5.4 s, where transformers takes 14.5 through MKL.
Command: `xglm bench decode-8 --backend torch`, with and without `XGLM_PLAIN=1`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from xglm_core.plain import use_plain
from xglm_torch.fast.choice import onednn, takes_onednn, takes_turned, turned

_PLAIN = (torch.Tensor, nn.Parameter)  # Subclasses may mean something else.


def linear_layer(width: int, new_width: int, bias: bool = True) -> nn.Linear:
    """A linear layer of the model: a `FastLinear` where there are both libraries, unless plain forms are asked for."""
    return (FastLinear if has_both() and not use_plain() else nn.Linear)(width, new_width, bias)


def make_plain(model: nn.Module) -> None:
    """Makes all fast layers of a model plain ones, for tools that know linear layers by their exact type."""
    for module in model.modules():
        if isinstance(module, FastLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


class FastLinear(nn.Linear):
    """An `nn.Linear` whose product goes through oneDNN, if that is there and the faster one.

    If gradients are recorded, so go the products of the backward pass. Left to PyTorch are other devices and types,
    subclasses of tensors, compiled and traced code, autocast, and function transforms.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight, bias = self.weight, self.bias
        # In one piece, as a step of one row calls it for each layer of each token.
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined]
            or not (type(states) in _PLAIN and type(weight) in _PLAIN)
            or not (states.dtype == weight.dtype == torch.float32 and states.is_cpu and weight.is_cpu)
            or not (has_both() and takes_onednn(states.numel() // weight.shape[1], weight.numel()))
            or torch.is_autocast_enabled("cpu")
            or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
        ):
            return F.linear(states, weight, bias)
        is_recording = states.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        if torch.is_grad_enabled() and is_recording:
            # As a matrix: what the library reshapes inside is a view, which code behind it could not change in place.
            rows = _Linear.apply(states.reshape(-1, states.shape[-1]), weight, bias)
            return rows.view(*states.shape[:-1], len(weight))
        if takes_turned(states.numel() // weight.shape[1], *weight.shape):
            return turned(states, weight, bias)
        return onednn(states, weight, bias)


class _Factors(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What a `FastLinear` with such a weight and bias returns."""
    return FastLinear.forward(_Factors(weight, bias), states)  # type: ignore[arg-type]


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, keep: bool = True) -> None:
    """Adds a product to `total`, or overwrites it.

    Args:
        total: float32 [rows, columns].
        left: [rows, width]; float32, or on a GPU a shorter type, of which the products are summed in float32.
        right: [width, columns], of the same type.
        keep: whether to add.
    """
    if left.dtype != total.dtype:
        if keep:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        else:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        return
    if adds_in_place(len(left), right):
        total.addmm_(left, right, beta=int(keep))
        return
    product = onednn(left, right.T)
    if keep:
        total += product
    else:
        total.copy_(product)


def adds_in_place(rows: int, factor: torch.Tensor) -> bool:
    """Whether `add_product` of so many rows with such a second factor takes no memory of its own."""
    return factor.device.type != "cpu" or not has_both() or use_plain() or not takes_onednn(rows, factor.numel())


class _Linear(torch.autograd.Function):
    """The product of a linear layer. Its gradients are such products, too."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return onednn(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.T) if needs_states else None,
            linear(grad.T, states.T) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


@functools.cache
def has_both() -> bool:
    """Whether there is a choice."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
