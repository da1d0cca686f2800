"""Multi-head attention: to the positions before, and to encoder states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.config import XGLMConfig
from xglm_flax.cache import Length
from xglm_flax.layers import dense, precision


class FlaxXGLMAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + mask) v, with biased projections, softmax in float32.

    Differs: `heads` is a count, and in PyTorch and Keras a list: the blocks of a scan share one module.

    Attributes:
        config: the architecture.
        heads: how many heads there are.
        dtype: type of the computation.
        param_dtype: type of the parameters.
    """

    config: XGLMConfig
    heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config, types = self.config, (self.dtype, self.param_dtype)
        width = self.heads * config.head_dim
        self.k_proj = dense(config, width, *types)
        self.v_proj = dense(config, width, *types)
        self.q_proj = dense(config, width, *types)
        self.out_proj = dense(config, config.d_model, *types)
        self.dropout = nn.Dropout(config.attention_dropout)

    def keys_and_values(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[batch, length, d_model] -> what there is to attend to, each [batch, heads, length, head_dim]."""
        return self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))

    def __call__(
        self,
        states: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        head_mask: jax.Array | None,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Attends from each position to the keys.

        Differs: PyTorch uses a fused kernel. JAX has one, too, but it is slow for single queries on a CPU.

        Args:
            states: [batch, length, d_model].
            key, value: [batch, heads, keys, head_dim].
            mask: bool [batch or 1, 1, length or 1, keys], True = attend; None = every key.
            head_mask: factors of these heads' probabilities [heads]; None = 1.
            deterministic: whether dropout is off.

        Returns:
            [batch, length, d_model], and the probabilities [batch, heads, length, keys].
        """
        query = self._split_heads(self.q_proj(states)) * self.config.head_dim**-0.5
        # The backward pass computes the steps to the probabilities again: they have several arrays of that size.
        weights = jax.checkpoint(_probabilities)(query, key, mask)
        context = jnp.einsum("bhqk,bhkd->bhqd", self.dropout(weights, deterministic), value, precision=precision())
        if head_mask is not None:
            # The factor of a head's probabilities is one of its result, which is smaller.
            factors = head_mask.astype(self.dtype)[None, :, None, None]
            context, weights = context * factors, weights * factors
        return self.out_proj(context.swapaxes(1, 2).reshape(*states.shape[:2], -1)), weights

    def _split_heads(self, states: jax.Array) -> jax.Array:
        """[batch, length, width] -> [batch, heads, length, head_dim]."""
        return states.reshape(*states.shape[:2], self.heads, -1).swapaxes(1, 2)


def attention_mask_for(mask: jax.Array | None, start: Length, length: int) -> jax.Array:
    """Which keys each new position sees: those up to itself that are not padding.

    Args:
        mask: bool [batch, keys], False for padding; None if there is none, and no key but the new positions.
        start: cached positions.
        length: new positions.

    Returns:
        bool [batch or 1, 1, length, keys], True = attend.
    """
    slots = jnp.arange(length if mask is None else mask.shape[1])
    causal = slots[None] <= start + jnp.arange(length)[:, None]
    return causal[None, None] if mask is None else causal[None, None] & mask[:, None, None, :]


def _probabilities(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[batch, heads, length, keys] in the type of `query`, which is scaled."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision=precision(), preferred_element_type=jnp.float32)
    if mask is not None:
        # Finite, so that a row without any visible key is a mean of values rather than NaN.
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)
