"""How fresh parameters are drawn: one definition for the Linen layers and for the model classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from xglm_core.config import XGLMConfig
from xglm_core.weight_names import EMBEDDING, WeightSpec

Initializer = Callable[..., jax.Array]


# One function for each deviation, so that what is compiled of it is found again.
_normal = functools.cache(nn.initializers.normal)


def kernel_init(config: XGLMConfig) -> Initializer:
    """N(0, init_std)."""
    return _normal(config.init_std)


def embedding_init(config: XGLMConfig) -> Initializer:
    """N(0, init_std), except for the padding row, which is zero."""
    return _embedding_init(config.init_std, config.pad_token_id)


def draw(spec: WeightSpec, config: XGLMConfig, key: jax.Array, dtype: Any) -> jax.Array:
    """A fresh parameter, in the shape that it has here.

    Differs: PyTorch and Keras draw weights without compiling. Linen's `init` would compile all blocks; this compiles
    one function for each shape, which other models use again.
    """
    if len(spec.shape) == 1:  # Of a norm, or any bias.
        init = nn.initializers.ones if spec.name.endswith(".weight") else nn.initializers.zeros
    else:
        init = embedding_init(config) if spec.name == EMBEDDING else kernel_init(config)
    return _draw(init, key, spec.shape[::-1] if spec.transposed else spec.shape, dtype)


_draw = jax.jit(lambda init, key, shape, dtype: init(key, shape, dtype), static_argnums=(0, 2, 3))


@functools.cache
def _embedding_init(init_std: float, pad_token_id: int | None) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        weight = _normal(init_std)(key, shape, dtype)
        return weight if pad_token_id is None else weight.at[pad_token_id].set(0)

    return init
