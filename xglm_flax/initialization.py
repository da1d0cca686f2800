"""How fresh parameters are drawn: one definition for the Linen layers and for the model classes."""

from __future__ import annotations

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

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        weight = kernel_init(config)(key, shape, dtype)
        return weight if config.pad_token_id is None else weight.at[config.pad_token_id].set(0)

    return init


def initializer_of(config: XGLMConfig) -> Callable[[WeightSpec], Initializer]:
    """Gives each weight its initialiser.

    Differs: initialising the Linen module would run all of its blocks. This compiles one function per shape, so that
    deep models take little longer than shallow ones.
    """
    kernel, embedding, ones, zeros = (
        jax.jit(init, static_argnums=(1, 2))
        for init in (kernel_init(config), embedding_init(config), nn.initializers.ones, nn.initializers.zeros)
    )

    def initializer(spec: WeightSpec) -> Initializer:
        if len(spec.shape) == 1:
            return ones if spec.name.endswith(".weight") else zeros  # Of a norm, or any bias.
        return embedding if spec.name == EMBEDDING else kernel

    return initializer
