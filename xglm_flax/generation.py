"""The generation engine: reads prompts, then takes up to 16 steps at a time, with selection, on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.generation.engine import BLOCK, Processor, check_processed
from xglm_core.generation.rules import Rules
from xglm_core.generation.selection import DeviceRules
from xglm_core.rounding import rounded_up
from xglm_flax.cache import FlaxXGLMCache, picked, reordered, with_capacity
from xglm_flax.fast import few_rows
from xglm_flax.fast.one_row import packed, unpacked
from xglm_flax.selection import device_rules, selection
from xglm_flax.stacking import unstack_layers
from xglm_flax.weights import Params


@dataclasses.dataclass(frozen=True)
class CompiledEngine:
    """The compiled functions of one module. Its parameters are an argument: as constants they would be copied.

    Attributes:
        prefill, feed, advance: see `_prefill`, `_feed` and `_advance`, without their first argument; they consume
            `cache` and `seen`.
    """

    prefill: Callable[..., Any]
    feed: Callable[..., Any]
    advance: Callable[..., Any]


def compile_engine(module: nn.Module) -> CompiledEngine:
    """Prepares the functions of a causal-LM module; each is compiled when it first meets a shape.

    A scan would copy the weights of each block for each token, so the blocks run one by one in any case.
    """
    unrolled = module.clone(scan_layers=False)
    return CompiledEngine(
        prefill=jax.jit(functools.partial(_prefill, unrolled), static_argnames="capacity", donate_argnames="cache"),
        feed=jax.jit(functools.partial(_feed, unrolled), donate_argnames=("cache", "seen")),
        advance=jax.jit(functools.partial(_advance, unrolled), donate_argnames=("cache", "seen")),
    )


class FlaxEngine:
    """Implements `xglm_core.generation.engine.Engine`.

    Differs: PyTorch compiles nothing. Here, as in Keras, all is compiled for fixed shapes: prompts and capacities are
    multiples of `bucket`, and the steps are a loop in compiled code.

    Args:
        compiled: the functions of the model.
        params: its parameters; stacked blocks are taken apart, in a copy.
        past: a cache to go on from, which stays as it is; None to begin.
    """

    bucket = 64
    logits: Any

    def __init__(self, compiled: CompiledEngine, params: Params, past: FlaxXGLMCache | None = None) -> None:
        self._compiled = compiled
        self._params = unstack_layers(params)
        self._transposed: Params | None = None
        self._steps = 0
        self._cache = past
        self._seen: jax.Array | None = None

    def prefill(self, tokens: np.ndarray, attention_mask: np.ndarray, capacity: int, seen: np.ndarray | None) -> None:
        """See `Engine.prefill`."""
        cache = self._cache
        if cache is not None:
            capacity = rounded_up(max(capacity, cache.capacity), self.bucket)
            attention_mask = np.pad(attention_mask, ((0, 0), (0, capacity - attention_mask.shape[1])))
            # A copy, as what follows is written in place.
            rows = np.arange(len(tokens)) if cache.batch == len(tokens) else np.zeros(len(tokens), int)  # One for all.
            cache = _copied(cache, rows, capacity=capacity)
        mask = attention_mask.astype(bool)
        if tokens.ndim == 3:
            inputs = DecoderInputs(inputs_embeds=tokens, attention_mask=mask)
        else:
            inputs = DecoderInputs(tokens.astype(np.int32), mask)
        self.logits, self._cache = self._compiled.prefill(self._params, inputs, cache=cache, capacity=capacity)
        if seen is not None:
            self._seen = _mark_seen(jnp.zeros(self.logits.shape, bool), seen)

    def reorder(self, rows: np.ndarray) -> None:
        """See `Engine.reorder`."""
        assert self._cache is not None  # As the prompts were read.
        self._cache = _reordered(self._cache, rows)
        self.logits = self.logits[rows]
        self._seen = None if self._seen is None else self._seen[rows]

    def feed(self, tokens: np.ndarray) -> None:
        """See `Engine.feed`."""
        self.logits, self._cache, self._seen = self._compiled.feed(
            self._params, tokens.astype(np.int32), cache=self._cache, seen=self._seen
        )

    def select(self, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.select`."""
        return np.asarray(_select(self.logits, self._seen, device_rules(rules), keys)).astype(np.int64)

    def advance(self, tokens: np.ndarray, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.advance`."""
        steps = keys.shape[1]
        selected, self.logits, self._cache, self._seen = self._compiled.advance(
            self._params_of_steps(len(tokens), steps),
            tokens.astype(np.int32),
            device_rules(rules),
            np.pad(keys, ((0, 0), (0, BLOCK - steps), (0, 0))),
            steps,
            cache=self._cache,
            seen=self._seen,
        )
        return np.asarray(selected)[:, :steps].astype(np.int64)

    def candidates(
        self, rules: Rules, totals: np.ndarray, keys: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.candidates`."""
        sums, index = _candidates(self.logits, self._seen, device_rules(rules), totals, keys, count=count)
        return np.asarray(sums), np.asarray(index).astype(np.int64)

    def scores(self, rules: Rules) -> jax.Array:
        """See `Engine.scores`."""
        return _scores(self.logits, self._seen, device_rules(rules))

    def recorded(self) -> jax.Array:
        """See `Engine.recorded`."""
        return self.logits

    def ids(self, sequences: np.ndarray) -> jax.Array:
        """See `Engine.ids`."""
        return jnp.asarray(sequences.astype(np.int32))

    def cache(self, places: np.ndarray, mask: np.ndarray) -> FlaxXGLMCache:
        """See `Engine.cache`."""
        assert self._cache is not None  # As the prompts were read.
        return picked(unpacked(self._cache), jnp.asarray(places.astype(np.int32)), jnp.asarray(mask))

    def _params_of_steps(self, rows: int, steps: int) -> Params:
        """The parameters for that many more steps."""
        self._steps += steps
        if self._transposed is None and few_rows.is_worth_transposing(rows, self._steps):
            self._transposed = few_rows.transposed(self._params)
        return self._params if self._transposed is None else self._transposed

    def process(self, processors: Sequence[Processor], sequences: np.ndarray) -> None:
        """See `Engine.process`."""
        ids, logits = self.ids(sequences), self.recorded()
        for place, processor in enumerate(processors):
            logits = processor(ids, logits)
            check_processed(logits, self.logits.shape, place)
        self.logits = logits


def _prefill(
    module: Any, params: Params, inputs: DecoderInputs, cache: FlaxXGLMCache | None, *, capacity: int
) -> tuple[jax.Array, FlaxXGLMCache]:
    """Reads prompts; returns logits [rows, vocab_size] and a cache with room for `capacity` positions."""
    logits, cache = _read(module, params, inputs, None if cache is None else unpacked(cache))
    return logits, packed(with_capacity(cache, capacity))


def _feed(
    module: Any, params: Params, tokens: jax.Array, cache: FlaxXGLMCache, seen: jax.Array | None
) -> tuple[jax.Array, FlaxXGLMCache, jax.Array | None]:
    """Reads ids [rows]; returns logits [rows, vocab_size], the cache, and which ids the sequences now contain."""
    seen = None if seen is None else selection.mark_seen(seen, tokens[:, None])
    logits, cache = _read(module, params, DecoderInputs(tokens[:, None]), unpacked(cache))
    return logits, packed(cache), seen


def _advance(
    module: Any,
    params: Params,
    tokens: jax.Array,
    rules: DeviceRules,
    keys: jax.Array,
    steps: jax.Array,
    cache: FlaxXGLMCache,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array, FlaxXGLMCache, jax.Array | None]:
    """Feeds ids [rows] and selects the next, `steps` times, with keys [rows, BLOCK, 2].

    `steps` is traced, so that one compilation serves all counts.

    Returns:
        The selected ids [rows, BLOCK], of which the first `steps` columns count, and what `_feed` returns.
    """

    def step(index: jax.Array, state: Any) -> Any:
        selected, tokens, _, cache, seen = state
        logits, cache, seen = _feed(module, params, tokens, cache, seen)
        chosen = _select(logits, seen, rules, keys[:, index])
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
    """Runs decoder and head; returns the logits of the last token of each row, and the cache."""

    def read(module: Any) -> tuple[jax.Array, FlaxXGLMCache]:
        results = module.model.decode(inputs, cache, Wanted(cache=True))
        return module.head(results.last_hidden_state[:, -1:])[:, 0], results.past_key_values

    with few_rows.products():
        logits_and_cache: tuple[jax.Array, FlaxXGLMCache] = module.apply({"params": params}, method=read)
    return logits_and_cache


_mark_seen = jax.jit(selection.mark_seen, donate_argnames="seen")


@functools.partial(jax.jit, static_argnames="capacity")
def _copied(cache: FlaxXGLMCache, rows: jax.Array, *, capacity: int) -> FlaxXGLMCache:
    return packed(reordered(cache, rows, capacity))


@jax.jit
def _reordered(cache: FlaxXGLMCache, rows: jax.Array) -> FlaxXGLMCache:
    return packed(reordered(unpacked(cache), rows, cache.capacity))


@jax.jit
def _select(logits: jax.Array, seen: jax.Array | None, rules: DeviceRules, keys: jax.Array) -> jax.Array:
    return selection.choose(selection.apply_penalties(logits, seen, rules), rules, keys)


@functools.partial(jax.jit, static_argnames="count")
def _candidates(
    logits: jax.Array, seen: jax.Array | None, rules: DeviceRules, totals: jax.Array, keys: jax.Array, *, count: int
) -> tuple[jax.Array, jax.Array]:
    return selection.choose_candidates(selection.apply_penalties(logits, seen, rules), rules, totals, keys, count)


@jax.jit
def _scores(logits: jax.Array, seen: jax.Array | None, rules: DeviceRules) -> jax.Array:
    return selection.filtered_logits(selection.apply_penalties(logits, seen, rules), rules)
