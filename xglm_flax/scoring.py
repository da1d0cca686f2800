"""The scoring engine: log-probabilities of given tokens, tile by tile of the logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.scoring import engine
from xglm_flax.layers import precision
from xglm_flax.selection import selection
from xglm_flax.weights import Params


def compile_scorer(module: nn.Module) -> Any:
    """The function of `xglm_core.scoring.engine.CompiledScorer`, compiled when it first meets a shape.

    Differs: PyTorch compiles nothing.
    """
    return jax.jit(functools.partial(_log_probabilities, module))


def _log_probabilities(
    module: Any,
    params: Params,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    filled: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `ScoringEngine.log_probabilities`; [chunks, chunk], of which the first `filled` chunks count."""
    inputs, variables = DecoderInputs(input_ids, attention_mask), {"params": params}
    results = module.apply(variables, method=lambda module: module.model.decode(inputs, None, Wanted()))
    states = results.last_hidden_state.reshape(-1, module.config.d_model)

    def step(index: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, likeliest = _of_targets(module, params, states[sources[index]], targets[index])
        return found[0].at[index].set(scores), found[1].at[index].set(likeliest)

    nothing = (jnp.zeros(sources.shape, jnp.float32), jnp.zeros(sources.shape, jnp.int32))
    return jax.lax.fori_loop(0, filled, step, nothing)


def _of_targets(module: Any, params: Params, states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each target, float32 [positions], after states [positions, d_model].

    And the id with the largest logit there, the lowest of equals, int32 [positions].
    """
    matrix, axis = module.apply({"params": params}, method="matrix")
    vocabulary = module.config.vocab_size
    tile = min(engine.TILE_VOCABULARY, vocabulary)

    def step(index: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last tile is a full one, too, and repeats some of the one before.
        begin = jnp.minimum(index * tile, vocabulary - tile).astype(jnp.int32)
        part = jax.lax.dynamic_slice_in_dim(matrix, begin, tile, axis).astype(module.dtype)
        logits = jnp.einsum(f"ld,{'dv' if axis else 'vd'}->lv", states, part, precision=precision()).astype(jnp.float32)
        return engine.with_tile(selection, found, logits, targets, begin, index * tile)

    nothing, tiles = jnp.zeros(targets.shape, jnp.float32), -(-vocabulary // tile)
    start = (nothing - jnp.inf, nothing, nothing - jnp.inf, jnp.zeros(targets.shape, jnp.int32))
    log_sum, of_targets, _, likeliest = jax.lax.fori_loop(0, tiles, step, start)
    return of_targets - log_sum, likeliest
