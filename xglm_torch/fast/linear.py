"""Float32 products on x86 CPUs through oneDNN, where PyTorch takes MKL. The plain form of each is `F.linear`.

Hardware: AMD processors, and few rows on Intel's. With AVX-512, MKL reaches 40 to 46% of oneDNN's speed on AMD.
Gain: on an Intel Xeon (Sapphire Rapids, two cores, 2026-11-28) decoding of eight rows takes 6.1 to 6.8 s in place of
9.4 to 9.8. There, one row is left to MKL, which took 3.5 to 3.6 s where oneDNN took 3.9 to 4.2; on an AMD EPYC MKL took
6.5 to 7.2 s where oneDNN took 4.8 to 5.1. A training step of 2 x 256 tokens takes 5.4 s
on two cores of an AMD EPYC (Zen 5), where transformers takes 14.5 through MKL.
Command: `python bench/speed.py torch decode8 CHECKPOINT`, with and without `XGLM_PLAIN=1`.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.plain import use_plain
from xglm_torch.recording import is_watched

_PLAIN = (torch.Tensor, nn.Parameter)  # Subclasses may mean something else.
_FEW_ROWS = 32  # Up to which oneDNN is the faster one on Intel's processors, too.


def linear_layer(width: int, new_width: int, bias: bool = True) -> nn.Linear:
    """A linear layer of the model: a `FastLinear` where there are both libraries, unless plain forms are asked for."""
    return (FastLinear if _has_both() and not use_plain() else nn.Linear)(width, new_width, bias)


def make_plain(model: nn.Module) -> None:
    """Makes all fast layers of a model plain ones, for tools that know linear layers by their exact type."""
    for module in model.modules():
        if type(module) is FastLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


class FastLinear(nn.Linear):
    """An `nn.Linear` whose product is `linear`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return F.linear(states, self.weight, self.bias)
        if states.numel() == states.shape[-1] and torch.is_inference_mode_enabled():  # A decoding step of one row.
            # Spelt out: `linear` would take several calls for each layer of each token.
            weight = self.weight
            if (
                _is_faster()
                and type(states) in _PLAIN
                and type(weight) in _PLAIN
                and states.dtype == weight.dtype == torch.float32
                and states.is_cpu
                and weight.is_cpu
                and not torch.is_autocast_enabled("cpu")
                and torch._C._functorch.peek_interpreter_stack() is None
            ):
                return torch.ops.mkldnn._linear_pointwise(states, weight, self.bias, "none", [], "")
            return F.linear(states, weight, self.bias)
        return linear(states, self.weight, self.bias)


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, through oneDNN if that is there and the faster one.

    If gradients are recorded, so go the products of the backward pass. Left to PyTorch are other devices and types,
    subclasses of tensors, compiled and traced code, autocast, and function transforms.
    """
    records = False
    for tensor in (states, weight) if bias is None else (states, weight, bias):
        if not (type(tensor) in _PLAIN and tensor.dtype == torch.float32 and tensor.is_cpu):
            return F.linear(states, weight, bias)
        records = records or tensor.requires_grad
    records = records and torch.is_grad_enabled()
    is_few = not records and states.numel() <= _FEW_ROWS * states.shape[-1]
    is_faster = _has_both() and (is_few or _is_faster())
    if not is_faster or torch.is_autocast_enabled("cpu") or is_watched():
        return F.linear(states, weight, bias)
    if records:
        # As a matrix: what the library reshapes inside is a view, which code behind it could not change in place.
        rows = _Linear.apply(states.reshape(-1, states.shape[-1]), weight, bias)
        return rows.view(*states.shape[:-1], len(weight))
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


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
    if adds_in_place(left):
        total.addmm_(left, right, beta=int(keep))
        return
    product = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    if keep:
        total += product
    else:
        total.copy_(product)


def adds_in_place(factor: torch.Tensor) -> bool:
    """Whether `add_product` with such a factor takes no memory of its own."""
    return factor.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not _is_faster() or use_plain()


class _Linear(torch.autograd.Function):
    """The product of a linear layer. Its gradients are such products, too."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

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
def _has_both() -> bool:
    """Whether there is a choice."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


@functools.cache
def _is_faster() -> bool:
    """Whether oneDNN is the faster one for many rows: on every x86 processor that is not Intel's."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with contextlib.suppress(OSError):
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    return "Intel" not in platform.processor()
