"""The scoring engine: log-probabilities of given tokens, tile by tile of the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.scoring import engine
from xglm_flax.weights import Params

CompiledScorer = Callable[..., tuple[jax.Array, jax.Array]]


def compile_scorer(module: nn.Module) -> CompiledScorer:
    """Prepares `_log_probabilities` of a causal-LM module, to be compiled when it first meets a shape."""
    return jax.jit(functools.partial(_log_probabilities, module))


class FlaxScorer:
    """Implements `xglm_core.scoring.engine.ScoringEngine`. Differs: everything is compiled for fixed shapes."""

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
    outputs = module.apply({"params": params}, input_ids, attention_mask, method="decode")
    states = outputs.last_hidden_state.reshape(-1, module.config.d_model)

    def step(index: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, likeliest = _of_targets(module, params, states[sources[index]], targets[index])
        return found[0].at[index].set(scores), found[1].at[index].set(likeliest)

    nothing = (jnp.zeros(sources.shape, jnp.float32), jnp.zeros(sources.shape, jnp.int32))
    return jax.lax.fori_loop(0, filled, step, nothing)


def _of_targets(module: Any, params: Params, states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers log softmax(head(states))[target], float32 [positions], for states [positions, d_model].

    And the ids with the largest logits, the first ones of equals, int32 [positions].
    """
    vocabulary = module.config.vocab_size
    block = min(engine.TILE_VOCABULARY, vocabulary)

    def step(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, of_targets, highest, likeliest = sums
        # The last block is a full one, too, and repeats some of the one before.
        begin = jnp.minimum(index * block, vocabulary - block).astype(jnp.int32)
        ids = begin + jnp.arange(block, dtype=jnp.int32)[None]
        logits = module.apply({"params": params}, states, begin, block, method="logits_of").astype(jnp.float32)
        of_targets = jnp.where(
            (targets >= begin) & (targets < begin + block),
            jnp.take_along_axis(logits, jnp.clip(targets - begin, 0, block - 1)[:, None], axis=1)[:, 0],
            of_targets,
        )
        logits = jnp.where(ids >= index * block, logits, -jnp.inf)
        of_block = logits.max(axis=1)
        # Not `argmax`, which XLA does not vectorise on CPUs.
        first = jnp.where(logits == of_block[:, None], ids, vocabulary).min(axis=1)
        likeliest = jnp.where(of_block > highest, first, likeliest)
        total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1))
        return total, of_targets, jnp.maximum(highest, of_block), likeliest

    nothing, blocks = jnp.zeros(targets.shape, jnp.float32), -(-vocabulary // block)
    start = (nothing - jnp.inf, nothing, nothing - jnp.inf, jnp.zeros(targets.shape, jnp.int32))
    total, of_targets, _, likeliest = jax.lax.fori_loop(0, blocks, step, start)
    return of_targets - total, likeliest
