"""The generation engine: reads prompts, then takes up to 16 steps at a time, with selection, on the device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.generation.compiled import Compiled, CompiledEngine
from xglm_core.generation.engine import BLOCK
from xglm_core.generation.rules import Rules
from xglm_core.generation.selection import DeviceRules
from xglm_flax.cache import FlaxXGLMCache, picked, reordered, with_capacity
from xglm_flax.fast import few_rows
from xglm_flax.fast.one_row import packed, unpacked
from xglm_flax.selection import selection
from xglm_flax.stacking import unstack_layers
from xglm_flax.weights import Params


def compile_engine(module: nn.Module) -> Compiled:
    """Prepares the functions of a causal-LM module; each is compiled when it first meets a shape.

    Parameters are an argument: as constants they would be copied. A scan would copy the weights of each block for each
    token, so the blocks run one by one in any case. Differs: PyTorch compiles nothing.
    """
    unrolled = module.clone(scan_layers=False)
    return Compiled(
        prefill=jax.jit(functools.partial(_prefill, unrolled), static_argnames="capacity", donate_argnames="cache"),
        feed=jax.jit(functools.partial(_feed, unrolled), donate_argnames=("cache", "seen")),
        advance=jax.jit(functools.partial(_advance, unrolled), donate_argnames=("cache", "seen")),
        select=_select,
        candidates=_candidates,
        scores=_scores,
        mark_seen=_mark_seen,
        copied=_copied,
        reordered=_reordered,
        picked=_picked,
    )


class FlaxEngine(CompiledEngine):
    """See `CompiledEngine`. Differs: shapes are free in `xglm_torch.generation.TorchEngine`, which compiles nothing.

    Args:
        compiled: the functions of the model.
        params: its parameters; stacked blocks are taken apart, in a copy.
        past: a cache to go on from, which stays as it is; None to begin.
    """

    bucket = 64

    def __init__(self, compiled: Compiled, params: Params, past: FlaxXGLMCache | None = None) -> None:
        super().__init__(compiled, past, unstack_layers(params))
        self._steps, self._is_transposed = 0, False

    def advance(self, tokens: np.ndarray, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.advance`."""
        self._steps += keys.shape[1]
        if not self._is_transposed and few_rows.is_worth_transposing(len(tokens), self._steps):
            self._weights, self._is_transposed = (few_rows.transposed(*self._weights),), True
        return super().advance(tokens, rules, keys)

    def ids(self, sequences: np.ndarray) -> jax.Array:
        """See `Engine.ids`."""
        return jnp.asarray(sequences.astype(np.int32))


def _prefill(
    module: Any, params: Params, inputs: DecoderInputs, cache: FlaxXGLMCache | None, capacity: int
) -> tuple[jax.Array, FlaxXGLMCache]:
    logits, cache = _read(module, params, inputs, None if cache is None else unpacked(cache))
    return logits, packed(with_capacity(cache, capacity))


def _feed(
    module: Any, params: Params, tokens: jax.Array, cache: FlaxXGLMCache, seen: jax.Array
) -> tuple[jax.Array, FlaxXGLMCache, jax.Array]:
    column = tokens[:, None]
    logits, cache = _read(module, params, DecoderInputs(column), unpacked(cache))
    return logits, packed(cache), selection.mark_seen(seen, column)


def _advance(
    module: Any,
    params: Params,
    tokens: jax.Array,
    cache: FlaxXGLMCache,
    seen: jax.Array,
    rules: DeviceRules,
    keys: jax.Array,
    steps: jax.Array,
) -> tuple[jax.Array, jax.Array, FlaxXGLMCache, jax.Array]:
    def step(index: jax.Array, state: Any) -> Any:
        selected, tokens, _, cache, seen = state
        logits, cache, seen = _feed(module, params, tokens, cache, seen)
        chosen = selection.select(logits, seen, rules, keys[:, index])
        # A code stands for no token.
        return selected.at[:, index].set(chosen), jnp.maximum(chosen, 0), logits, cache, seen

    rows = len(tokens)
    selected = jnp.zeros((rows, BLOCK), jnp.int32)
    logits = jnp.zeros((rows, module.config.vocab_size), module.dtype)
    selected, _, *rest = jax.lax.fori_loop(0, steps, step, (selected, tokens, logits, cache, seen))
    return selected, *rest


def _read(
    module: Any, params: Params, inputs: DecoderInputs, cache: FlaxXGLMCache | None
) -> tuple[jax.Array, FlaxXGLMCache]:
    """The logits of the last token of each row [rows, vocab_size], and the cache."""

    def read(module: Any) -> tuple[jax.Array, FlaxXGLMCache]:
        results = module.model.decode(inputs, cache, Wanted(cache=True))
        return module.head(results.last_hidden_state[:, -1:])[:, 0], results.past_key_values

    with few_rows.products():
        logits_and_cache: tuple[jax.Array, FlaxXGLMCache] = module.apply({"params": params}, method=read)
    return logits_and_cache


_select = jax.jit(selection.select)
_candidates = jax.jit(selection.candidates, static_argnames="count")
_scores = jax.jit(selection.scores)
_mark_seen = jax.jit(selection.mark_seen, donate_argnames="seen")


@functools.partial(jax.jit, static_argnames="capacity")
def _copied(cache: FlaxXGLMCache, rows: jax.Array | None, capacity: int) -> FlaxXGLMCache:
    return packed(reordered(cache, jnp.arange(cache.batch) if rows is None else rows, capacity))


@jax.jit
def _reordered(
    cache: FlaxXGLMCache, logits: jax.Array, seen: jax.Array, rows: jax.Array
) -> tuple[FlaxXGLMCache, jax.Array, jax.Array]:
    return packed(reordered(unpacked(cache), rows, cache.capacity)), logits[rows], seen[rows]


def _picked(cache: FlaxXGLMCache, places: np.ndarray, mask: np.ndarray) -> FlaxXGLMCache:
    return picked(unpacked(cache), jnp.asarray(places), jnp.asarray(mask))
