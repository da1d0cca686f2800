"""Float32 matrix products on x86 CPUs, where PyTorch's choice of library can cost more than half of the speed.

PyTorch gives these products to MKL, which on AMD processors with AVX-512 reaches 40 to 46% of what oneDNN does with the
same factors in the same layout; on older ones, the two are equal. On Intel's, MKL is the slower one for the few rows
of a decoding step alone.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Within it, `F.linear` in float32 on a CPU goes through oneDNN, if that is there and the faster one.

    If gradients are recorded, so do the products of the backward pass. Everything else stays as it is: other devices
    and types, subclasses of tensors, compiled and traced code, autocast, and function transforms.
    """
    available = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not available or (torch.is_grad_enabled() and not _trains_faster()):
        yield
        return
    with _OneDNN():
        yield


def with_fast_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """The function with `fast_products` around it whenever it records gradients and is not itself recorded."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_recorded() or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with fast_products():
            return function(*args, **kwargs)

    return wrapped


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
    product = _product(left, right.T, None)
    if keep:
        total += product
    else:
        total.copy_(product)


def adds_in_place(factor: torch.Tensor) -> bool:
    """Whether `add_product` with such a factor takes no memory of its own."""
    return factor.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not _trains_faster()


class _OneDNN(TorchFunctionMode):
    """Redirects the products of linear layers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            func is F.linear
            and not kwargs
            and all(map(is_plain, args))
            and not (torch.is_autocast_enabled("cpu") or is_recorded() or is_transformed())
        ):
            states, weight, bias = (*args, None)[:3]
            return _linear(states, weight, bias)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """The product of a linear layer and its gradients, which are such products too."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, len(weight))
        return (
            _linear(gradient, weight.T, None) if of_states else None,
            _linear(rows.T, states.reshape(-1, weight.shape[1]).T, None) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product `states @ weight.T + bias` of what `is_plain`."""
    tensors = states, weight, bias
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        # As a matrix: what the library reshapes inside is a view, which code behind it could not change in place.
        rows = _Linear.apply(states.reshape(-1, states.shape[-1]), weight, bias)
        return rows.view(*states.shape[:-1], len(weight))
    return _product(*tensors)


def _product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def is_plain(tensor: torch.Tensor | None) -> bool:
    """Whether a factor or summand is float32 in the memory of the CPU, and no subclass that means something else."""
    return tensor is None or (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
    )


def is_recorded() -> bool:
    """Whether operations are being recorded, by compiler, export or trace, to run later with other values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward differentiation, wants to see each operation."""
    return hides_values() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def hides_values() -> bool:
    """Whether a transform of `torch.func` is at work: results of operations then have no values to look at."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


@functools.cache
def _trains_faster() -> bool:
    """Whether oneDNN is the faster one for products of many rows: on every x86 processor that is not Intel's."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with contextlib.suppress(OSError):
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    return "Intel" not in platform.processor()
