"""Products of 2 to 16 rows on a CPU, with the matrix in the order in which XLA reads it fastest.

The plain forms are `nn.Dense` and the head's own product; these replace them while `generate` takes its steps.

Hardware: CPUs. XLA reads a matrix [features, width] that comes first as fast as memory gives it, and any other at half
that speed. The transposed kernels take the memory of the blocks again while the text is generated.
Gain: half of the time of a step of 8 rows.
Date: 2026-11-26. Command: `xglm bench decode-8 --backend flax`, with and without `XGLM_PLAIN=1`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.plain import use_plain
from xglm_flax.fast.barriers import barrier
from xglm_flax.layers import precision
from xglm_flax.weights import Params

MOST_ROWS = 16
_FEW_STEPS = 8  # By then the transposition has paid for itself.
_TRANSPOSED = "transposed_kernel"


def is_worth_transposing(rows: int, steps: int) -> bool:
    """Whether to use `transposed` for texts of so many rows after so many steps."""
    is_few = 1 < rows <= MOST_ROWS and steps >= _FEW_STEPS
    return is_few and jax.default_backend() == "cpu" and not use_plain()


def transposed(params: Params) -> Params:
    """The parameters with the kernels of the blocks transposed, under another name: for use within `products`."""
    decoder = params["model"]
    layers = {index: _transposed(block) for index, block in decoder["layers"].items()}
    return {**params, "model": {**decoder, "layers": layers}}


def products() -> contextlib.AbstractContextManager[Any]:
    """Within it, modules take transposed kernels, and a tied head multiplies few rows as fast."""
    return contextlib.nullcontext() if use_plain() else nn.intercept_methods(_product)


def few_rows_product(states: jax.Array, matrix: jax.Array) -> jax.Array:
    """[..., width] by a matrix [features, width] -> [..., features]."""
    rows = states.reshape(-1, states.shape[-1])
    # Without the barrier XLA would transpose the matrix rather than the product.
    product = barrier(jnp.einsum("ow,nw->on", matrix, rows, precision=precision()))
    return product.T.reshape(*states.shape[:-1], -1)


@jax.jit
def _transposed(tree: Any) -> Any:
    """The parameters of a block with each kernel transposed."""
    if not isinstance(tree, dict):
        return tree
    return {_TRANSPOSED if k == "kernel" else k: v.T if k == "kernel" else _transposed(v) for k, v in tree.items()}


def _product(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """What a method of a module computes; some products in the order above."""
    module: Any = context.module
    if isinstance(module, nn.Dense) and context.method_name == "__call__":
        own = module.variables["params"]
        if _TRANSPOSED in own:
            product = few_rows_product(args[0].astype(module.dtype), own[_TRANSPOSED].astype(module.dtype))
            return product + own["bias"].astype(module.dtype)[None, None]
    elif context.method_name == "head" and 1 < args[0].shape[0] <= MOST_ROWS:
        matrix, axis = module.matrix()
        if axis == 0:
            return few_rows_product(args[0], matrix.astype(module.dtype))
    return call(*args, **kwargs)
