"""Whether something looks on while operations run: a compiler, a trace, or a transform of functions."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_recorded() -> bool:
    """Whether compiler, export or trace record the operations, to run them later with other values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward differentiation, must see each operation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether either holds, so that each operation must be PyTorch's own."""
    return is_recorded() or is_transformed()


def hides_values() -> bool:
    """Whether a transform of `torch.func` is at work: tensors then have no values to look at."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
