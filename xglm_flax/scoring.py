"""The scoring engine: log-probabilities of given tokens, tile by tile of the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.scoring import engine
from xglm_flax.layers import precision
from xglm_flax.weights import Params

CompiledScorer = Callable[..., tuple[jax.Array, jax.Array]]


def compile_scorer(module: nn.Module) -> CompiledScorer:
    """Prepares `_log_probabilities` of a causal-LM module, to be compiled when it first meets a shape."""
    return jax.jit(functools.partial(_log_probabilities, module))


class FlaxScorer:
    """Implements `xglm_core.scoring.engine.ScoringEngine`. Differs: PyTorch compiles nothing and has free shapes."""

    bucket = 64

    def __init__(self, compiled: CompiledScorer, params: Params) -> None:
        self._compiled = compiled
        self._params = params

    def log_probabilities(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, sources: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ScoringEngine.log_probabilities`."""
        places, wanted = engine.in_chunks(sources, input_ids.size), engine.in_chunks(targets, input_ids.size)
        filled = -(-len(targets) // places.shape[1])
        found = self._compiled(self._params, input_ids, attention_mask, places, wanted, filled)
        scores, likeliest = (np.asarray(array).reshape(-1)[: len(targets)] for array in found)
        return scores, likeliest


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

    def step(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        log_sum, of_targets, max_logit, likeliest = sums
        # The last tile is a full one, too, and repeats some of the one before.
        begin = jnp.minimum(index * tile, vocabulary - tile).astype(jnp.int32)
        ids = begin + jnp.arange(tile, dtype=jnp.int32)[None]
        part = jax.lax.dynamic_slice_in_dim(matrix, begin, tile, axis).astype(module.dtype)
        logits = jnp.einsum(f"ld,{'dv' if axis else 'vd'}->lv", states, part, precision=precision()).astype(jnp.float32)
        of_targets = jnp.where(
            (targets >= begin) & (targets < begin + tile),
            jnp.take_along_axis(logits, jnp.clip(targets - begin, 0, tile - 1)[:, None], axis=1)[:, 0],
            of_targets,
        )
        logits = jnp.where(ids >= index * tile, logits, -jnp.inf)
        max_of_tile = logits.max(axis=1)
        # Not `argmax`, which XLA does not vectorise on CPUs.
        first = jnp.where(logits == max_of_tile[:, None], ids, vocabulary).min(axis=1)
        likeliest = jnp.where(max_of_tile > max_logit, first, likeliest)
        log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(logits, axis=1))
        return log_sum, of_targets, jnp.maximum(max_logit, max_of_tile), likeliest

    nothing, tiles = jnp.zeros(targets.shape, jnp.float32), -(-vocabulary // tile)
    start = (nothing - jnp.inf, nothing, nothing - jnp.inf, jnp.zeros(targets.shape, jnp.int32))
    log_sum, of_targets, _, likeliest = jax.lax.fori_loop(0, tiles, step, start)
    return of_targets - log_sum, likeliest
