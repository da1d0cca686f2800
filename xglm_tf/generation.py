"""The generation engine: reading, several tokens at a time, and selection on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.generation.engine import BLOCK, Processor, check_processed
from xglm_core.generation.rules import Rules
from xglm_core.generation.selection import DeviceRules
from xglm_core.rounding import rounded_up
from xglm_tf.cache import TFXGLMCache, empty_cache, picked, reordered, with_capacity
from xglm_tf.fast.one_row import packed, unpacked
from xglm_tf.selection import device_rules, selection

if TYPE_CHECKING:
    from xglm_tf.causal_lm import TFXGLMForCausalLM


@dataclasses.dataclass(frozen=True)
class CompiledEngine:
    """The compiled functions of one model. They refer to its variables, so that there is no second copy.

    Differs: PyTorch compiles nothing.

    Attributes:
        prefill, feed, advance: see `_prefill`, `_feed` and `_advance`, without their first argument.
        select, candidates, scores: see `_select`, `_candidates` and `_scores`.
    """

    prefill: Callable[..., tuple[tf.Tensor, TFXGLMCache]]
    feed: Callable[..., tuple[tf.Tensor, TFXGLMCache, tf.Tensor]]
    advance: Callable[..., tuple[tf.Tensor, tf.Tensor, TFXGLMCache, tf.Tensor]]
    select: Callable[..., tf.Tensor]
    candidates: Callable[..., tuple[tf.Tensor, tf.Tensor]]
    scores: Callable[..., tf.Tensor]


def compile_engine(model: TFXGLMForCausalLM) -> CompiledEngine:
    """Prepares the functions of a model; each is compiled when it first meets a shape or rules of another kind.

    Differs: PyTorch compiles nothing.
    """
    compiled = functools.partial(tf.function, jit_compile=True, autograph=False)
    return CompiledEngine(
        prefill=compiled(functools.partial(_prefill, model)),
        feed=compiled(functools.partial(_feed, model)),
        advance=compiled(functools.partial(_advance, model)),
        select=compiled(_select),
        candidates=compiled(_candidates),
        scores=compiled(_scores),
    )


class TFEngine:
    """Implements `xglm_core.generation.engine.Engine`.

    Differs: everything is compiled for fixed shapes, which `xglm_torch.generation.TorchEngine` does not need. So
    prompts and capacities are multiples of `bucket`, and the steps are a loop in compiled code.

    Args:
        compiled: the functions of the model.
        past: a cache to go on from, which stays as it is; None to begin.
    """

    bucket = 32
    logits: tf.Tensor
    _cache: TFXGLMCache

    def __init__(self, compiled: CompiledEngine, past: TFXGLMCache | None = None) -> None:
        self._compiled = compiled
        self._past = past
        self._seen = tf.zeros((0, 0), tf.bool)

    def prefill(self, tokens: np.ndarray, attention_mask: np.ndarray, capacity: int, seen: np.ndarray | None) -> None:
        """See `Engine.prefill`."""
        past, capacity = self._past, rounded_up(capacity, self.bucket)
        if past is not None:
            if past.batch != len(tokens):  # One row, for all of them.
                past = reordered(past, self._tensor(np.zeros(len(tokens), int)))
            capacity = max(capacity, int(past.capacity))
            past = with_capacity(past, capacity)
        mask = np.zeros((len(tokens), capacity), bool)
        mask[:, : attention_mask.shape[1]] = attention_mask
        given = tf.constant(tokens, tf.int32 if tokens.ndim == 2 else tf.float32)
        self.logits, self._cache = self._compiled.prefill(given, tf.constant(mask), past)
        # Without columns if nobody will ask: marking ids in it then does nothing.
        self._seen = tf.zeros((len(tokens), 0 if seen is None else self.logits.shape[1]), tf.bool)
        if seen is not None:
            self._seen = selection.mark_seen(self._seen, self._tensor(seen))

    def reorder(self, rows: np.ndarray) -> None:
        """See `Engine.reorder`."""
        places = self._tensor(rows)
        self._cache = reordered(self._cache, places)
        self.logits = tf.gather(self.logits, places)
        self._seen = tf.gather(self._seen, places)

    def feed(self, tokens: np.ndarray) -> None:
        """See `Engine.feed`."""
        self.logits, self._cache, self._seen = self._compiled.feed(self._tensor(tokens), self._cache, self._seen)

    def select(self, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.select`."""
        selected = self._compiled.select(self.logits, self._seen, device_rules(rules), tf.constant(keys))
        return selected.numpy().astype(np.int64)

    def advance(self, tokens: np.ndarray, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.advance`."""
        steps = keys.shape[1]
        padded = tf.constant(np.pad(keys, ((0, 0), (0, BLOCK - steps), (0, 0))))
        selected, self.logits, self._cache, self._seen = self._compiled.advance(
            self._tensor(tokens), self.logits, self._cache, self._seen, device_rules(rules), padded, tf.constant(steps)
        )
        return selected[:, :steps].numpy().astype(np.int64)

    def candidates(
        self, rules: Rules, totals: np.ndarray, keys: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.candidates`."""
        sums, index = self._compiled.candidates(
            self.logits, self._seen, device_rules(rules), tf.constant(totals), tf.constant(keys), count
        )
        return sums.numpy(), index.numpy().astype(np.int64)

    def scores(self, rules: Rules) -> tf.Tensor:
        """See `Engine.scores`."""
        return self._compiled.scores(self.logits, self._seen, device_rules(rules))

    def recorded(self) -> tf.Tensor:
        """See `Engine.recorded`."""
        return self.logits

    def ids(self, sequences: np.ndarray) -> tf.Tensor:
        """See `Engine.ids`."""
        return tf.constant(sequences)

    def cache(self, places: np.ndarray, mask: np.ndarray) -> TFXGLMCache:
        """See `Engine.cache`."""
        return picked(self._cache, self._tensor(places), tf.constant(mask))

    def process(self, processors: Sequence[Processor], sequences: np.ndarray) -> None:
        """See `Engine.process`."""
        ids, logits = self.ids(sequences), self.recorded()
        for place, processor in enumerate(processors):
            logits = processor(ids, logits)
            check_processed(logits, tuple(self.logits.shape), place)
        self.logits = logits

    def _tensor(self, array: np.ndarray) -> tf.Tensor:
        """Integers."""
        return tf.constant(array, tf.int32)


def _prefill(
    model: TFXGLMForCausalLM, tokens: tf.Tensor, mask: tf.Tensor, past: TFXGLMCache | None
) -> tuple[tf.Tensor, TFXGLMCache]:
    """Reads ids [rows, length] or embeddings [rows, length, d_model].

    Args:
        model: the model.
        tokens: ids or embeddings.
        mask: that of the cache, bool [rows, capacity].
        past: a cache of that capacity; None to begin.

    Returns:
        The logits of the last token of each row [rows, vocab_size], and the cache.
    """
    if past is None:
        past = empty_cache(model.config, mask.shape[0], mask.shape[1], model.compute_dtype)
    if tokens.dtype.is_floating:
        return _read(model, DecoderInputs(attention_mask=mask, inputs_embeds=tokens), past)
    return _read(model, DecoderInputs(tokens, mask), past)


def _feed(
    model: TFXGLMForCausalLM, tokens: tf.Tensor, cache: TFXGLMCache, seen: tf.Tensor
) -> tuple[tf.Tensor, TFXGLMCache, tf.Tensor]:
    """Reads an id of each row [rows]; returns logits [rows, vocab_size], the cache, and `seen` with these ids."""
    column = tokens[:, None]
    return *_read(model, DecoderInputs(column), cache), selection.mark_seen(seen, column)


def _read(model: TFXGLMForCausalLM, inputs: DecoderInputs, cache: TFXGLMCache) -> tuple[tf.Tensor, TFXGLMCache]:
    """The logits of the last token of each row [rows, vocab_size], and the cache."""
    results = model.model(inputs, cache, wanted=Wanted(cache=True))
    return model.logits(results.last_hidden_state[:, -1:])[:, 0], results.past_key_values


def _select(logits: tf.Tensor, seen: tf.Tensor, rules: DeviceRules, keys: tf.Tensor) -> tf.Tensor:
    """The next id of each row, int32 [rows]; `keys` uint32 [rows, 2]."""
    return selection.choose(selection.apply_penalties(logits, seen, rules), rules, keys)


def _advance(
    model: TFXGLMForCausalLM,
    tokens: tf.Tensor,
    logits: tf.Tensor,
    cache: TFXGLMCache,
    seen: tf.Tensor,
    rules: DeviceRules,
    keys: tf.Tensor,
    steps: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, TFXGLMCache, tf.Tensor]:
    """Feeds the last ids [rows] and selects the next, `steps` times.

    `steps` is a tensor, so that one compilation serves all counts; `keys` are uint32 [rows, BLOCK, 2]. The logits
    before count for nothing but the shape and type of those after.

    Returns:
        The selected ids, int32 [rows, BLOCK], of which the first `steps` columns count; the logits of the last step
        [rows, vocab_size], the cache, and `seen`.
    """
    columns = tf.range(BLOCK)

    def step(
        index: tf.Tensor, tokens: tf.Tensor, selected: tf.Tensor, _: tf.Tensor, cache: TFXGLMCache, seen: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, TFXGLMCache, tf.Tensor]:
        logits, cache, seen = _feed(model, tokens, _with_layers(cache, unpacked), seen)
        chosen = _select(logits, seen, rules, tf.gather(keys, index, axis=1))
        selected = tf.where(columns == index, chosen[:, None], selected)
        # A code stands for no token.
        return index + 1, tf.maximum(chosen, 0), selected, logits, _with_layers(cache, packed), seen

    rows = tokens.shape[0]
    begin = (0, tokens, tf.zeros((rows, BLOCK), tf.int32), logits, _with_layers(cache, packed), seen)
    _, _, selected, logits, cache, seen = tf.while_loop(lambda index, *_: index < steps, step, begin)
    return selected, logits, _with_layers(cache, unpacked), seen


def _with_layers(cache: TFXGLMCache, change: Callable[[Any], Any]) -> TFXGLMCache:
    """The cache with its layers packed or unpacked."""
    return dataclasses.replace(cache, layers=change(cache.layers))


def _candidates(
    logits: tf.Tensor, seen: tf.Tensor, rules: DeviceRules, totals: tf.Tensor, keys: tf.Tensor, count: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """See `Selection.choose_candidates`."""
    return selection.choose_candidates(selection.apply_penalties(logits, seen, rules), rules, totals, keys, count)


def _scores(logits: tf.Tensor, seen: tf.Tensor, rules: DeviceRules) -> tf.Tensor:
    """See `Selection.filtered_logits`."""
    return selection.filtered_logits(selection.apply_penalties(logits, seen, rules), rules)


def draw_seed() -> int:
    """A seed that `keras.utils.set_random_seed` and `tf.random.set_seed` make repeatable."""
    return int(tf.random.uniform((), maxval=tf.int64.max, dtype=tf.int64))
