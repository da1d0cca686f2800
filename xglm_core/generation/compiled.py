"""The engine of backends that compile: fixed shapes, numpy arrays outside, arrays of the device inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from xglm_core.calls import DecoderInputs
from xglm_core.generation.engine import BLOCK, Processor, processed
from xglm_core.generation.rules import Rules
from xglm_core.generation.selection import DeviceRules
from xglm_core.rounding import rounded_up


class Compiled(NamedTuple):
    """What a backend compiles. Shapes are part of a program; lengths, steps and rules' values are not.

    The first three belong to a model, and take its weights first, if they are arguments. They may take the memory of
    the cache and of `seen`, bool [rows, vocab_size], or [rows, 0] if nobody asks which ids the sequences contain.

    Attributes:
        prefill: (`DecoderInputs`, cache or None, capacity) -> logits of the last token of each row [rows, vocab_size],
            and a cache with room for `capacity` positions.
        feed: (ids [rows], cache, seen) -> logits, cache, seen.
        advance: (ids [rows], cache, seen, rules, keys [rows, BLOCK, 2], steps) -> ids [rows, BLOCK], of which the first
            `steps` columns count; then what `feed` returns.
        select, candidates, scores, mark_seen: see `Selection`.
        copied: (cache, rows or None, capacity) -> a cache of these rows, or of all, with room; the first one stays.
        reordered: (cache, logits, seen, rows) -> the same of these rows.
        picked: (cache, places, mask) -> see `Engine.cache`.
    """

    prefill: Callable[..., Any]
    feed: Callable[..., Any]
    advance: Callable[..., Any]
    select: Callable[..., Any]
    candidates: Callable[..., Any]
    scores: Callable[..., Any]
    mark_seen: Callable[..., Any]
    copied: Callable[..., Any]
    reordered: Callable[..., Any]
    picked: Callable[..., Any]


class CompiledEngine:
    """Implements `Engine` by compiled functions. Prompts and capacities are multiples of `bucket`.

    Args:
        compiled: the functions.
        past: a cache to go on from, which stays as it is; None to begin.
        weights: what the functions of the model take first.
    """

    bucket: int
    shows_rows = False
    logits: Any

    def __init__(self, compiled: Compiled, past: Any = None, *weights: Any) -> None:
        self._compiled = compiled
        self._cache = past
        self._weights = weights
        self._seen: Any = None

    def prefill(self, tokens: np.ndarray, attention_mask: np.ndarray, capacity: int, seen: np.ndarray | None) -> None:
        """See `Engine.prefill`."""
        past, rows, mask = self._cache, len(tokens), attention_mask != 0
        if past is not None:
            capacity = rounded_up(max(capacity, int(past.capacity)), self.bucket)
            mask = np.pad(mask, ((0, 0), (0, capacity - mask.shape[1])))
            # One row serves all.
            past = self._compiled.copied(past, None if past.batch == rows else np.zeros(rows, np.int32), capacity)
        if tokens.ndim == 2:
            inputs = DecoderInputs(tokens.astype(np.int32), mask)
        else:
            inputs = DecoderInputs(attention_mask=mask, inputs_embeds=tokens)
        self.logits, self._cache = self._compiled.prefill(*self._weights, inputs, past, capacity)
        self._seen = np.zeros((rows, 0 if seen is None else self.logits.shape[1]), bool)
        if seen is not None:
            self._seen = self._compiled.mark_seen(self._seen, seen)

    def reorder(self, rows: np.ndarray) -> None:
        """See `Engine.reorder`."""
        state = self._cache, self.logits, self._seen
        self._cache, self.logits, self._seen = self._compiled.reordered(*state, rows.astype(np.int32))

    def feed(self, tokens: np.ndarray) -> None:
        """See `Engine.feed`."""
        ids = tokens.astype(np.int32)
        self.logits, self._cache, self._seen = self._compiled.feed(*self._weights, ids, self._cache, self._seen)

    def select(self, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.select`."""
        return _int64(self._compiled.select(self.logits, self._seen, device_rules(rules), keys))

    def advance(self, tokens: np.ndarray, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.advance`."""
        steps, state = keys.shape[1], (tokens.astype(np.int32), self._cache, self._seen)
        padded = np.pad(keys, ((0, 0), (0, BLOCK - steps), (0, 0)))
        selected, self.logits, self._cache, self._seen = self._compiled.advance(
            *self._weights, *state, device_rules(rules), padded, np.array(steps, np.int32)
        )
        return _int64(selected)[:, :steps]

    def candidates(
        self, rules: Rules, totals: np.ndarray, keys: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.candidates`."""
        found = self._compiled.candidates(self.logits, self._seen, device_rules(rules), totals, keys, count=count)
        return np.asarray(found[0]), _int64(found[1])

    def scores(self, rules: Rules) -> Any:
        """See `Engine.scores`."""
        return self._compiled.scores(self.logits, self._seen, device_rules(rules))

    def recorded(self) -> Any:
        """See `Engine.recorded`."""
        return self.logits

    def ids(self, sequences: np.ndarray) -> Any:
        """See `Engine.ids`."""
        raise NotImplementedError

    def cache(self, places: np.ndarray, mask: np.ndarray) -> Any:
        """See `Engine.cache`."""
        return self._compiled.picked(self._cache, places.astype(np.int32), mask)

    def process(self, processors: Sequence[Processor], sequences: np.ndarray) -> None:
        """See `Engine.process`."""
        self.logits = processed(processors, self.ids(sequences), self.logits)


def device_rules(rules: Rules) -> DeviceRules:
    """The rules for compiled code, which converts numpy arrays by itself."""
    return DeviceRules.of(rules, np.asarray, compiled=True)


def _int64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.int64)
