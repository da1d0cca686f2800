"""The generation engine: reading, one token at a time, and selection on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import BLOCK, Processor, check_processed
from xglm_core.generation.rules import Rules
from xglm_core.generation.selection import DeviceRules
from xglm_core.rounding import rounded_up
from xglm_flax.attention import FEW_ROWS, few_rows_product
from xglm_flax.cache import FlaxXGLMCache, picked, reordered, with_capacity
from xglm_flax.selection import device_rules, selection
from xglm_flax.stacking import unstack_layers
from xglm_flax.weights import Params

_QUICK = "transposed_kernel"
_MANY_STEPS = 8  # In as many the transposition has paid for itself.


@dataclasses.dataclass(frozen=True)
class CompiledEngine:
    """The compiled functions of one module. They take its parameters as an argument, so that there is no second copy.

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

    Differs: everything is compiled for fixed shapes, so prompts and capacities are multiples of `bucket`, and the steps
    are a loop in compiled code.

    Args:
        compiled: the functions of the model that continues the texts.
        params: its parameters; stacked blocks are taken apart, which takes their memory again.
        past: a cache to go on from, which stays as it is; None to begin.
    """

    bucket = 64
    logits: Any

    def __init__(self, compiled: CompiledEngine, params: Params, past: FlaxXGLMCache | None = None) -> None:
        self._compiled = compiled
        self._params = unstack_layers(params)
        self._quick: Params | None = None
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
        given = {"inputs_embeds": tokens} if tokens.ndim == 3 else {"input_ids": tokens.astype(np.int32)}
        self.logits, self._cache = self._compiled.prefill(
            self._params, given, attention_mask.astype(bool), cache=cache, capacity=capacity
        )
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

    def ids(self, texts: np.ndarray) -> jax.Array:
        """See `Engine.ids`."""
        return jnp.asarray(texts.astype(np.int32))

    def cache(self, places: np.ndarray, mask: np.ndarray) -> FlaxXGLMCache:
        """See `Engine.cache`."""
        assert self._cache is not None  # As the prompts were read.
        return picked(_unpacked(self._cache), jnp.asarray(places.astype(np.int32)), jnp.asarray(mask))

    def _params_of_steps(self, rows: int, steps: int) -> Params:
        """The parameters for that many more steps; of few rows but many steps on a CPU, those of `_transposed`."""
        self._steps += steps
        if self._steps < _MANY_STEPS or not 1 < rows <= FEW_ROWS or jax.default_backend() != "cpu":
            return self._params
        if self._quick is None:
            self._quick = _transposed(self._params)
        return self._quick

    def process(self, processors: Sequence[Processor], texts: np.ndarray) -> None:
        """See `Engine.process`."""
        ids, logits = self.ids(texts), self.recorded()
        for place, processor in enumerate(processors):
            logits = processor(ids, logits)
            check_processed(logits, self.logits.shape, place)
        self.logits = logits


def _prefill(
    module: Any,
    params: Params,
    tokens: dict[str, jax.Array],
    attention_mask: jax.Array,
    cache: FlaxXGLMCache | None,
    *,
    capacity: int,
) -> tuple[jax.Array, FlaxXGLMCache]:
    """Reads prompts; returns logits [rows, vocab_size] and a cache with room for `capacity` positions."""
    past = None if cache is None else _unpacked(cache)
    logits, cache = _read(module, params, past, attention_mask=attention_mask, **tokens)
    return logits, _packed(with_capacity(cache, capacity))


def _feed(
    module: Any, params: Params, tokens: jax.Array, cache: FlaxXGLMCache, seen: jax.Array | None
) -> tuple[jax.Array, FlaxXGLMCache, jax.Array | None]:
    """Reads ids [rows]; returns logits [rows, vocab_size], the cache, and what the texts now contain."""
    seen = None if seen is None else selection.mark_seen(seen, tokens[:, None])
    logits, cache = _read(module, params, _unpacked(cache), input_ids=tokens[:, None])
    return logits, _packed(cache), seen


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
    module: Any, params: Params, cache: FlaxXGLMCache | None, **arguments: jax.Array
) -> tuple[jax.Array, FlaxXGLMCache]:
    """Runs the module; returns the logits of the last token of each row, and the cache."""
    with nn.intercept_methods(_dense):
        outputs = module.apply(
            {"params": params}, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True, **arguments
        )
    return outputs.logits[:, 0], outputs.past_key_values


def _transposed(params: Params) -> Params:
    """The parameters with the kernels of the blocks as `few_rows_product` wants them, under another name.

    Differs: XLA reads them twice as fast so. They take the memory of the blocks again while a text is generated, and
    half of the time of each step from then on.
    """
    decoder = params["model"]
    layers = {index: _turned(block) for index, block in decoder["layers"].items()}
    return {**params, "model": {**decoder, "layers": layers}}


@jax.jit
def _turned(tree: Any) -> Any:
    """A block with its kernels transposed."""
    if not isinstance(tree, dict):
        return tree
    return {_QUICK if k == "kernel" else k: v.T if k == "kernel" else _turned(v) for k, v in tree.items()}


def _dense(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """What `nn.Dense` computes, also from a kernel of `_transposed`."""
    module: Any = context.module
    if (
        not isinstance(module, nn.Dense)
        or context.method_name != "__call__"
        or _QUICK not in module.variables["params"]
    ):
        return call(*args, **kwargs)
    (states,), own = args, module.variables["params"]
    product = few_rows_product(states.astype(module.dtype), own[_QUICK].astype(module.dtype))
    return product + own["bias"].astype(module.dtype)[None, None]


def _packed(cache: FlaxXGLMCache) -> FlaxXGLMCache:
    """The cache as it goes from step to step: that of one row without the axis of rows, see `put`."""
    return _reshaped(cache, lambda states: states.squeeze(0)) if cache.batch == 1 else cache


def _unpacked(cache: FlaxXGLMCache) -> FlaxXGLMCache:
    """The cache with the axis of rows again."""
    return _reshaped(cache, lambda states: states[None]) if cache.batch == 1 else cache


def _reshaped(cache: FlaxXGLMCache, change: Callable[[jax.Array], jax.Array]) -> FlaxXGLMCache:
    return dataclasses.replace(cache, keys=jax.tree.map(change, cache.keys), values=jax.tree.map(change, cache.values))


_mark_seen = jax.jit(selection.mark_seen, donate_argnames="seen")


@functools.partial(jax.jit, static_argnames="capacity")
def _copied(cache: FlaxXGLMCache, rows: jax.Array, *, capacity: int) -> FlaxXGLMCache:
    return _packed(reordered(cache, rows, capacity))


@jax.jit
def _reordered(cache: FlaxXGLMCache, rows: jax.Array) -> FlaxXGLMCache:
    return _packed(reordered(_unpacked(cache), rows, cache.capacity))


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


def seed_of(prng_key: jax.Array, generation: GenerationConfig, options: Mapping[str, Any]) -> int:
    """The seed that a key stands for.

    Args:
        prng_key: a key of JAX, or its words, uint32 [any].
        generation: the options of the call.
        options: those that were given beside the key.

    Raises:
        InputError: it is no key, a seed is given as well, or nothing is drawn.
    """
    if options.get("seed") is not None:
        raise InputError("seed and prng_key are both given, expected one of the two")
    if not generation.do_sample:
        raise InputError("prng_key has no effect without do_sample=True")
    is_key = jnp.issubdtype(getattr(prng_key, "dtype", np.int64), jax.dtypes.prng_key)
    words = np.asarray(jax.random.key_data(prng_key) if is_key else prng_key)
    if words.dtype != np.uint32 or words.ndim != 1:
        raise InputError(
            f"prng_key is {words.dtype} {list(words.shape)}, expected a single key, such as jax.random.key(0)"
        )
    return int.from_bytes(words.astype("<u4").tobytes(), "little")
