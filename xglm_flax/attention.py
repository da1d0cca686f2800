"""Multi-head attention: to the positions before, and to encoder states."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from xglm_core.config import XGLMConfig
from xglm_flax.cache import Length
from xglm_flax.dropout import FlaxXGLMDropout
from xglm_flax.initialization import kernel_init

FEW_ROWS = 16  # For how many, but more than one, `few_rows_product` is the faster one.


class FlaxXGLMAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + mask) v, with biased projections, softmax in float32.

    Attributes:
        config: the architecture.
        heads: how many of its heads there are.
        dtype: type of the computation.
        param_dtype: type of the parameters.
    """

    config: XGLMConfig
    heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        width = self.heads * config.head_dim
        self.k_proj = dense(config, width, self.dtype, self.param_dtype)
        self.v_proj = dense(config, width, self.dtype, self.param_dtype)
        self.q_proj = dense(config, width, self.dtype, self.param_dtype)
        self.out_proj = dense(config, config.d_model, self.dtype, self.param_dtype)
        self.dropout = FlaxXGLMDropout(config.attention_dropout)

    def keys_and_values(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[batch, length, d_model] -> what there is to attend to, each [batch, heads, length, head_dim]."""
        return self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))

    def __call__(
        self,
        hidden_states: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        *,
        head_mask: jax.Array | None = None,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends from each position to the keys.

        Differs: JAX's fused attention is slow for single queries on a CPU, so the products are written out, and there
        is no faster path without a mask; `deterministic` switches dropout off.

        Args:
            hidden_states: [batch, length, d_model].
            key, value: [batch, heads, keys, head_dim].
            mask: bool [batch or 1, 1, length or 1, keys], True = attend; None = every key.
            head_mask: factors of these heads' probabilities [heads]; None = 1.
            output_attentions: whether to return the probabilities.
            deterministic: whether to keep all attention probabilities.

        Returns:
            [batch, length, d_model], and the probabilities [batch, heads, length, keys] or None.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        # The backward pass computes the steps to the probabilities again: they have several arrays of that size.
        weights = jax.checkpoint(_probabilities)(query, key, mask)
        dropped = self.dropout(weights, deterministic)
        context = jnp.einsum("bhqk,bhkd->bhqd", dropped, value, precision=precision())
        if head_mask is not None:
            # The factor of a head's probabilities is one of its result, which is smaller.
            factors = head_mask.astype(self.dtype)[None, :, None, None]
            context = context * factors
            weights = weights * factors
        states = self.out_proj(context.swapaxes(1, 2).reshape(*hidden_states.shape[:2], -1))
        return states, weights if output_attentions else None

    def _split_heads(self, states: jax.Array) -> jax.Array:
        """[batch, length, width] -> [batch, heads, length, head_dim]."""
        return states.reshape(*states.shape[:2], self.heads, -1).swapaxes(1, 2)


def _probabilities(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[batch, heads, length, keys] in the type of the computation."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision=precision(), preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        # Finite, so that a row without any visible key is a mean of values rather than NaN.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)


class FlaxXGLMDense(nn.Dense):
    """A projection.

    Differs: the rows lie along one axis. Along two, XLA would transpose a copy of them for the gradient of the kernel.
    The result has the projection's name, "fc1" say, for policies of `jax.checkpoint_policies`.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., width] -> [..., features]."""
        rows = checkpoint_name(super().__call__(inputs.reshape(-1, inputs.shape[-1])), self.name)
        return rows.reshape(*inputs.shape[:-1], self.features)


def dense(config: XGLMConfig, features: int, dtype: Any, param_dtype: Any, *, use_bias: bool = True) -> nn.Dense:
    """A projection to `features`. Differs: Flax takes types, precision and initialisation layer by layer."""
    return FlaxXGLMDense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision(),
        kernel_init=kernel_init(config),
    )


def precision() -> jax.lax.Precision | None:
    """Of products: the highest, unless `jax.default_matmul_precision` is set, which then decides.

    JAX's own default lets accelerators round the factors of float32 products to 10 bits (TF32) or 8 (bfloat16).
    """
    config: Any = jax.config
    return jax.lax.Precision.HIGHEST if config.jax_default_matmul_precision is None else None


def few_rows_product(states: jax.Array, matrix: jax.Array) -> jax.Array:
    """[batch, length, width] by a matrix [features, width] -> [batch, length, features].

    For a few rows, XLA's product on a CPU is as fast as it can read a matrix that comes first and has this layout, and
    half as fast with any other order; which it would choose, were the result not computed before it is transposed.
    """
    rows = states.reshape(-1, states.shape[-1])
    product = computed(jnp.einsum("ow,nw->on", matrix, rows, precision=precision()))
    return product.T.reshape(*states.shape[:-1], -1)


def computed(x: jax.Array) -> jax.Array:
    """`x`, to be computed before it is used, and so its gradient."""
    return jax.lax.optimization_barrier(x) if _barriers_have_gradients() else x


@functools.cache
def _barriers_have_gradients() -> bool:
    """Whether this JAX can differentiate a barrier: 0.5 cannot."""
    try:
        jax.eval_shape(jax.grad(jax.lax.optimization_barrier), 1.0)
    except NotImplementedError:
        return False
    return True


def attention_mask_for(mask: jax.Array | None, past: Length, length: int) -> jax.Array:
    """Which keys each new position sees: those up to itself that are not padding.

    Args:
        mask: bool [batch, keys], False for padding; None if there is none, and no key but the new positions.
        past: cached positions.
        length: new positions.

    Returns:
        bool [batch or 1, 1, length, keys], True = attend.
    """
    slots = jnp.arange(length if mask is None else mask.shape[1])
    causal = slots[None] <= past + jnp.arange(length)[:, None]
    return causal[None, None] if mask is None else causal[None, None] & mask[:, None, None, :]
