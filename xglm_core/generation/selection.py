"""From logits to tokens, on the device: the steps of `Rules`, written once for all frameworks.

A backend supplies a table of array operations (`Selection`). Everything else is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from xglm_core.generation.engine import NOT_A_NUMBER, NOTHING_LEFT
from xglm_core.generation.randomness import GOLDEN, MULTIPLIERS, SHIFTS
from xglm_core.generation.rules import Rules
from xglm_core.rounding import power_of_two

_IMPOSSIBLE = -math.inf
_MIN_WIDTH = 64  # Compiled code sorts at least so many candidates, so that most values of `top_k` share a program.
_UNLIMITED = 2**31 - 1


@dataclass(frozen=True, eq=False)
class DeviceRules:
    """`Rules` in the form that selection takes: compiled code depends on the fields, but not on the values.

    Attributes:
        values: arrays by the names of `Rules`, for the steps that have an effect; `log_min_p` is the logarithm of
            `min_p`.
        normalized, renormalized, forced, sample: see `Rules`.
        width: how many candidates to sort; 0 if the limits do not need sorted scores.
    """

    values: dict[str, Any]
    normalized: bool
    renormalized: bool
    forced: bool
    sample: bool
    width: int

    @classmethod
    def of(cls, rules: Rules, array: Callable[[Any], Any], *, compiled: bool) -> Self:
        """Converts rules.

        Args:
            rules: the rules.
            array: converts a numpy array or scalar to an array of the framework.
            compiled: whether the framework compiles a program for each combination of steps. Then cheap steps are
                always present, with values that change nothing, and the width is a power of two.
        """
        values: dict[str, Any] = {"banned": rules.banned, "bias": rules.bias}
        width = 0
        if rules.penalized:
            values["repetition_penalty"] = np.float32(rules.repetition_penalty)
        if rules.sample:
            values["temperature"] = np.float32(rules.temperature)
            if compiled or rules.top_p < 1:  # Infinite, as rounded sums reach 1 early.
                values["top_p"] = np.float32(rules.top_p if rules.top_p < 1 else math.inf)
            if compiled or rules.min_p > 0:
                values["log_min_p"] = np.float32(math.log(rules.min_p) if rules.min_p > 0 else -math.inf)
            if rules.typical_p < 1:
                values["typical_p"] = np.float32(rules.typical_p)
            if rules.ordered:
                width = rules.top_k or _UNLIMITED
                values["top_k"] = np.int32(width)
                values["min_tokens_to_keep"] = np.int32(rules.min_tokens_to_keep)
                width = power_of_two(max(width, _MIN_WIDTH)) if compiled else width
        return cls(
            {name: array(value) for name, value in values.items() if value is not None},
            rules.normalized,
            rules.renormalized,
            rules.forced,
            rules.sample,
            width,
        )

    # TensorFlow's protocol for arguments of `tf.function`: static fields, then tensors.
    def __tf_flatten__(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(self, field.name) for field in fields(self)[1:]), (self.values,)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[Any, ...], components: tuple[Any, ...]) -> Self:
        return cls(*components, *metadata)


@dataclass(frozen=True)
class Selection:
    """Selects tokens by the array operations of a framework, which act on the last axis of arrays [rows, columns].

    Attributes:
        float32: (array) -> the array as float32.
        reshape, broadcast_to, full_like, where, isnan, exp, log, log1p, softmax, log_softmax, cumsum: as in numpy.
        put: (array, columns [rows, any], values or a scalar) -> a changed copy; columns beyond the last are ignored.
        take: (array, columns [rows, any]) -> the elements there.
        iota: (array) -> the column of each element.
        max: (array) -> the maximum of each row [rows, 1]; NaN if the row contains NaN.
        argmax: (array) -> the column of the maximum of each row [rows]; of equal elements, the first.
        top: (array, count) -> the largest elements of each row in descending order, and their columns.
        argsort: (array) -> the columns in ascending order of the elements; stable.
        sum, logsumexp: (array) -> those of each row [rows, 1].
        uint32: (integers) -> words of 32 bits.
        low_bits: (words) -> the lower 32 bits of sums and products, where words are wider.
        right_shift: (words, count) -> the shifted words.
    """

    float32: Callable[[Any], Any]
    reshape: Callable[[Any, Any], Any]
    broadcast_to: Callable[[Any, Any], Any]
    full_like: Callable[[Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]
    put: Callable[[Any, Any, Any], Any]
    take: Callable[[Any, Any], Any]
    iota: Callable[[Any], Any]
    max: Callable[[Any], Any]
    argmax: Callable[[Any], Any]
    top: Callable[[Any, int], tuple[Any, Any]]
    argsort: Callable[[Any], Any]
    isnan: Callable[[Any], Any]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    log1p: Callable[[Any], Any]
    softmax: Callable[[Any], Any]
    log_softmax: Callable[[Any], Any]
    cumsum: Callable[[Any], Any]
    sum: Callable[[Any], Any]
    logsumexp: Callable[[Any], Any]
    uint32: Callable[[Any], Any]
    low_bits: Callable[[Any], Any]
    right_shift: Callable[[Any, Any], Any]

    def select(self, logits: Any, seen: Any, rules: DeviceRules, keys: Any) -> Any:
        """See `choose`: of logits [rows, vocab_size] and `seen`, bool [rows, vocab_size]."""
        return self.choose(self.apply_penalties(logits, seen, rules), rules, keys)

    def candidates(
        self, logits: Any, seen: Any, rules: DeviceRules, totals: Any, keys: Any, count: int
    ) -> tuple[Any, Any]:
        """See `choose_candidates`: of logits and `seen`."""
        return self.choose_candidates(self.apply_penalties(logits, seen, rules), rules, totals, keys, count)

    def scores(self, logits: Any, seen: Any, rules: DeviceRules) -> Any:
        """See `filtered_logits`: of logits and `seen`."""
        return self.filtered_logits(self.apply_penalties(logits, seen, rules), rules)

    def mark_seen(self, seen: Any, ids: Any) -> Any:
        """Marks ids [rows, any] in `seen`, bool [rows, vocab_size]; ids beyond the vocabulary are ignored."""
        return self.put(seen, ids, True)

    def apply_penalties(self, logits: Any, seen: Any, rules: DeviceRules) -> Any:
        """Steps 1 to 4 of `Rules`: the scores of all ids, float32 [rows, vocab_size]."""
        scores, values = self.float32(logits), rules.values
        if rules.normalized:
            scores = self.log_softmax(scores)
        if "bias" in values:
            scores = self.broadcast_to(values["bias"], scores.shape) if rules.forced else scores + values["bias"]
        if "repetition_penalty" in values:
            factor = values["repetition_penalty"]
            scores = self.where(seen, self.where(scores < 0, scores * factor, scores / factor), scores)
        if values["banned"].shape[1]:
            scores = self.put(scores, values["banned"], _IMPOSSIBLE)
        return scores

    def choose(self, scores: Any, rules: DeviceRules, keys: Any) -> Any:
        """Chooses an id for each row, or a code in its place [rows]; `keys`, words [rows, 2], give the noise."""
        highest = self.max(scores)[:, 0]
        if rules.sample:
            scores, ids = self.filter_logits(scores, rules)
            place = self.argmax(scores + self.gumbel(keys, ids))
            chosen = self.take(ids, place[:, None])[:, 0]
        else:
            chosen = self.argmax(scores)
        chosen = self.where(highest == _IMPOSSIBLE, NOTHING_LEFT, chosen)
        return self.where(self.isnan(highest), NOT_A_NUMBER, chosen)

    def choose_candidates(self, scores: Any, rules: DeviceRules, totals: Any, keys: Any, count: int) -> tuple[Any, Any]:
        """Finds the best continuations of each group of beams.

        Args:
            scores: float32 [groups * beams, vocab_size].
            rules: the rules.
            totals: what to add to the scores of each beam, float32 [groups, beams].
            keys: the keys of the groups' noise, words [groups, 2].
            count: how many continuations to find.

        Returns:
            Totals plus scores, float32, and beam * vocab_size + id, each [groups, count]. If a group has a NaN, its
            totals are NaN.
        """
        groups, beams = totals.shape
        vocab_size = scores.shape[1]
        # Frameworks do not agree on where NaN sorts.
        broken = self.isnan(self.max(self.reshape(scores, (groups, -1))))
        if rules.sample:
            scores, ids = self.filter_logits(scores, rules)
        else:
            scores, ids = self.top(self.renormalize(scores, rules), min(count, vocab_size))
        ids, scores = (self.reshape(array, (groups, beams, -1)) for array in (ids, scores))
        index = self.reshape(ids + (self.iota(totals) * vocab_size)[:, :, None], (groups, -1))
        sums = self.reshape(scores + totals[:, :, None], (groups, -1))
        _, place = self.top(sums + self.gumbel(keys, index) if rules.sample else sums, count)
        return self.where(broken, math.nan, self.take(sums, place)), self.take(index, place)

    def filtered_logits(self, scores: Any, rules: DeviceRules) -> Any:
        """The scores of all ids, minus infinity for those that the limits remove: float32 [rows, vocab_size]."""
        if not rules.sample:
            return self.renormalize(scores, rules)
        values, ids = self.filter_logits(scores, rules)
        return self.put(self.full_like(scores, _IMPOSSIBLE), ids, values)

    def filter_logits(self, scores: Any, rules: DeviceRules) -> tuple[Any, Any]:
        """Steps 5 and 6 of `Rules`: the candidates' scores and ids, each [rows, count], sorted only if necessary."""
        scores, ids = self.limit(scores / rules.values["temperature"], rules)
        if "typical_p" in rules.values:
            log_probabilities = self.log_softmax(scores)
            probabilities = self.exp(log_probabilities)
            entropy = -self.sum(self.where(probabilities > 0, probabilities * log_probabilities, 0.0))
            place = self.argsort(abs(log_probabilities + entropy))
            scores, ids, probabilities = (self.take(array, place) for array in (scores, ids, probabilities))
            kept = self._mass_before(probabilities) < rules.values["typical_p"]
            scores = self.where(kept | self._kept_always(scores, rules), scores, _IMPOSSIBLE)
        return self.renormalize(scores, rules), ids

    def limit(self, scores: Any, rules: DeviceRules) -> tuple[Any, Any]:
        """Applies `top_k`, `top_p` and `min_p`; returns what `filter_logits` does."""
        if not rules.width:
            if "log_min_p" in rules.values:
                scores = self.where(scores < self.max(scores) + rules.values["log_min_p"], _IMPOSSIBLE, scores)
            return scores, self.iota(scores)
        scores, ids = self.top(scores, min(rules.width, scores.shape[1]))
        return self.where(self.kept(scores, rules), scores, _IMPOSSIBLE), ids

    def kept(self, scores: Any, rules: DeviceRules) -> Any:
        """Which scores [rows, any], in descending order, `top_k`, `top_p` and `min_p` keep: bool [rows, any]."""
        values = rules.values
        kept = self.iota(scores) < values["top_k"]
        if "top_p" in values:
            likeliest = self.where(kept, scores, _IMPOSSIBLE)
            kept = kept & (self._mass_before(self.softmax(likeliest)) < values["top_p"])
        if "log_min_p" in values:
            kept = kept & (scores >= scores[:, :1] + values["log_min_p"])
        return kept | self._kept_always(scores, rules)

    def renormalize(self, scores: Any, rules: DeviceRules) -> Any:
        """Turns scores [rows, any] into log-probabilities if the rules say so; the choice stays the same."""
        if not rules.renormalized:
            return scores
        total = self.logsumexp(scores)
        return scores - self.where(total > _IMPOSSIBLE, total, 0.0)  # All may be banned.

    def gumbel(self, keys: Any, index: Any) -> Any:
        """The noise of each index, float32 [rows, any]; see `xglm_core.generation.randomness`."""
        uniform = (self.float32(self.noise_bits(keys, index)) + 0.5) * 2.0**-32
        return -self.log(-self.log1p(-uniform))

    def noise_bits(self, keys: Any, index: Any) -> Any:
        """See `xglm_core.generation.randomness.noise_bits`: of keys [rows, 2] and indices [rows, any], [rows, any]."""
        bits = self.low_bits(self.uint32(index) * np.uint32(GOLDEN) + keys[:, :1])
        return self._mixed(self._mixed(bits) ^ keys[:, 1:])

    def _mixed(self, bits: Any) -> Any:
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
            bits = self.low_bits((bits ^ self.right_shift(bits, np.uint32(shift))) * np.uint32(multiplier))
        return bits

    def _mass_before(self, probabilities: Any) -> Any:
        """The sum of the probabilities before each one, in each row."""
        return self.cumsum(probabilities) - probabilities

    def _kept_always(self, scores: Any, rules: DeviceRules) -> Any:
        """The first columns, which no limit removes: bool [rows, any]."""
        return self.iota(scores) < rules.values["min_tokens_to_keep"]
