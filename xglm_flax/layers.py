"""Projections and norms. Differs: PyTorch and Keras have such layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_flax.fast.barriers import barrier
from xglm_flax.initialization import kernel_init


class FlaxXGLMDense(nn.Dense):
    """A projection. Its result has the projection's name, "fc1" say, for policies of `jax.checkpoint_policies`."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[batch, length, width] -> [batch, length, features]."""
        # One axis for all rows: with two, XLA would transpose a copy of them for the gradient of the kernel.
        rows = checkpoint_name(super().__call__(inputs.reshape(-1, inputs.shape[-1])), self.name)
        return rows.reshape(*inputs.shape[:-1], self.features)


def dense(config: XGLMConfig, features: int, dtype: Any, param_dtype: Any, *, use_bias: bool = True) -> nn.Dense:
    """A projection to `features`."""
    return FlaxXGLMDense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision(),
        kernel_init=kernel_init(config),
    )


class FlaxXGLMLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, in at least float32.

    Differs: PyTorch and Keras use the norm of the framework. `nn.LayerNorm` leaves types to promotion, which users may
    forbid (`jax_numpy_dtype_promotion`).

    Attributes:
        dtype: type of the computation, if it is wider than float32.
        param_dtype: type of the parameters.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        """[batch, length, d_model] -> the same, in the type of `states`."""
        dtype = self.dtype if jnp.dtype(self.dtype).itemsize >= 4 else jnp.float32
        shape = states.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype).astype(dtype)[None, None]
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype).astype(dtype)[None, None]
        centred = barrier(states).astype(dtype)
        centred = centred - centred.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        return (centred * (jax.lax.rsqrt(variance + LAYER_NORM_EPS) * scale) + bias).astype(states.dtype)


def precision() -> jax.lax.Precision | None:
    """Of products: the highest, unless `jax.default_matmul_precision` is set, which then decides.

    JAX's own default lets accelerators round the factors of float32 products to 10 bits (TF32) or 8 (bfloat16).
    """
    config: Any = jax.config
    return jax.lax.Precision.HIGHEST if config.jax_default_matmul_precision is None else None
