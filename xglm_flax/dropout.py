"""Dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.dropout import BITS, drop_level


class FlaxXGLMDropout(nn.Module):
    """Dropout, as `nn.Dropout`, which draws 32 bits for each number, and takes six times as long on a CPU.

    Attributes:
        rate: drop probability in [0, 1]; see `drop_level`.
    """

    rate: float

    @nn.compact
    def __call__(self, states: jax.Array, deterministic: bool) -> jax.Array:
        """Drops some of the numbers [..., width], unless `deterministic`; needs the "dropout" generator."""
        level, factor = drop_level(self.rate)
        if deterministic or not level:
            return states
        width = states.shape[-1]
        words = jax.random.bits(self.make_rng("dropout"), (*states.shape[:-1], -(-width // 2)), jnp.uint32)
        bits = jnp.concatenate([words & (2**BITS - 1), words >> BITS], axis=-1)[..., :width]
        return jnp.where(bits >= level, states * jnp.asarray(factor, states.dtype), 0)
