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


def kernel_init(config: XGLMConfig) -> Initializer:
    """N(0, init_std)."""
    return nn.initializers.normal(config.init_std)


def embedding_init(config: XGLMConfig) -> Initializer:
    """N(0, init_std), except for the padding row, which is zero."""
    return _embedding_init(config.init_std, config.pad_token_id)


def initializer_of(config: XGLMConfig) -> Callable[[WeightSpec], Initializer]:
    """Gives each weight its initialiser.

    Differs: PyTorch and Keras draw weights without compiling. Linen's `init` would compile all blocks; this compiles
    one function for each shape, which other models use again.
    """
    kernel, embedding, ones, zeros = _compiled(config.init_std, config.pad_token_id)

    def initializer(spec: WeightSpec) -> Initializer:
        if len(spec.shape) == 1:
            return ones if spec.name.endswith(".weight") else zeros  # Of a norm, or any bias.
        return embedding if spec.name == EMBEDDING else kernel

    return initializer


def _embedding_init(init_std: float, pad_token_id: int | None) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        weight = nn.initializers.normal(init_std)(key, shape, dtype)
        return weight if pad_token_id is None else weight.at[pad_token_id].set(0)

    return init


@functools.cache
def _compiled(init_std: float, pad_token_id: int | None) -> tuple[Initializer, ...]:
    """Those of matrices, of the embedding, of ones and of zeros."""
    normal, embedding = nn.initializers.normal(init_std), _embedding_init(init_std, pad_token_id)
    every = (normal, embedding, nn.initializers.ones, nn.initializers.zeros)
    return tuple(jax.jit(init, static_argnums=(1, 2)) for init in every)
