"""Multi-head self-attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.config import XGLMConfig
from xglm_flax.cache import FlaxXGLMCache

# JAX's default lets accelerators round the factors of float32 products to 10 bits (TF32) or 8 (bfloat16).
PRECISION = jax.lax.Precision.HIGHEST


class FlaxXGLMAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + mask) v, with biased projections, softmax in float32.

    Attributes:
        config: the architecture.
        dtype: type of the computation.
        param_dtype: type of the parameters.
    """

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        self.k_proj = dense(config, config.d_model, self.dtype, self.param_dtype)
        self.v_proj = dense(config, config.d_model, self.dtype, self.param_dtype)
        self.q_proj = dense(config, config.d_model, self.dtype, self.param_dtype)
        self.out_proj = dense(config, config.d_model, self.dtype, self.param_dtype)
        self.dropout = nn.Dropout(config.attention_dropout)

    def __call__(
        self,
        hidden_states: jax.Array,
        mask: jax.Array,
        cache: FlaxXGLMCache | None,
        layer: int,
        deterministic: bool = True,
    ) -> tuple[jax.Array, FlaxXGLMCache | None]:
        """Attends from each new position to the cached and the new ones.

        Differs: JAX's fused attention is slow for single queries on a CPU, so the products are written out; a mask is
        always given; a cache is a pure value, so the written one is returned; `deterministic` switches dropout off.

        Args:
            hidden_states: [batch, length, d_model].
            mask: bool [batch or 1, 1, length, keys], True = attend; the keys are the new positions alone, or all that
                the cache has room for.
            cache: where the new keys and values go, or None.
            layer: index of this block in the cache.
            deterministic: whether to keep all attention probabilities.

        Returns:
            [batch, length, d_model], and the cache with the new keys and values.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states))
        if cache is not None:
            cache = cache.write(layer, key, value)
            if mask.shape[3] != key.shape[2]:  # A cache that the new positions fill holds no others.
                key, value = cache.keys[layer], cache.values[layer]
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision=PRECISION, preferred_element_type=jnp.float32)
        # Finite, so that a row without any visible key is a mean of values rather than NaN.
        scores = jnp.where(mask, scores * self.config.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        weights = self.dropout(jax.nn.softmax(scores, axis=-1).astype(self.dtype), deterministic=deterministic)
        context = jnp.einsum("bhqk,bhkd->bqhd", weights, value, precision=PRECISION)
        return self.out_proj(context.reshape(hidden_states.shape)), cache

    def _split_heads(self, states: jax.Array) -> jax.Array:
        """[batch, length, d_model] -> [batch, heads, length, head_dim]."""
        return states.reshape(*states.shape[:2], self.config.attention_heads, -1).swapaxes(1, 2)


def dense(config: XGLMConfig, features: int, dtype: Any, param_dtype: Any, *, use_bias: bool = True) -> nn.Dense:
    """A projection to `features`. Differs: Flax takes types, precision and initialisation layer by layer."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=PRECISION,
        kernel_init=nn.initializers.normal(config.init_std),
    )


def attention_mask_for(mask: jax.Array | None, past: jax.Array | int, length: int) -> jax.Array:
    """Which keys each new position sees: those up to itself that are not padding.

    Args:
        mask: bool [batch, keys], False for padding; None if there is none, and no key but the new positions.
        past: cached positions.
        length: new positions.

    Returns:
        bool [batch or 1, 1, length, keys], True = attend.
    """
    slots = jnp.arange(length if mask is None else mask.shape[1])
    causal = slots <= past + jnp.arange(length)[:, None]
    return causal[None, None] if mask is None else causal & mask[:, None, None, :]
