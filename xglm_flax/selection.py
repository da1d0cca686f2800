"""From logits to tokens, on the device; see `xglm_core.generation.rules.Rules` for the steps and their order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from xglm_core.generation.engine import NOT_A_NUMBER, NOTHING_LEFT
from xglm_core.generation.randomness import GOLDEN, MULTIPLIERS, SHIFTS
from xglm_core.generation.rules import Rules

_IMPOSSIBLE = -jnp.inf
_GROUP = 128  # Neighbours of which `largest` first sees the best: few enough to sort all of a few dozen groups.

Number = np.float32 | None  # Traced; None where there is no such step.


@dataclass(frozen=True)
class TracedRules:
    """`Rules` as compiled code takes them. Differs: which steps there are is compiled, while their numbers are traced.

    Attributes:
        banned: ids, int32 [rows, width].
        repetition_penalty, temperature, top_p, typical_p: see `Rules`.
        log_min_p: logarithm of `Rules.min_p`.
        normalized, sample, top_k, least, ordered: see `Rules`.
    """

    banned: jax.Array | np.ndarray
    repetition_penalty: Number
    temperature: Number
    top_p: Number
    log_min_p: Number
    typical_p: Number
    normalized: bool
    sample: bool
    top_k: int
    least: int
    ordered: bool

    @classmethod
    def of(cls, rules: Rules) -> TracedRules:
        """The same rules; what has no effect is left out, so that it does not ask for code of its own."""
        sample = rules.sample
        return cls(
            banned=rules.banned,
            repetition_penalty=np.float32(rules.repetition_penalty) if rules.penalized else None,
            temperature=np.float32(rules.temperature) if sample else None,
            top_p=np.float32(rules.top_p) if sample and rules.top_p < 1 else None,
            log_min_p=np.float32(math.log(rules.min_p)) if sample and rules.min_p > 0 else None,
            typical_p=np.float32(rules.typical_p) if sample and rules.typical_p < 1 else None,
            normalized=rules.normalized,
            sample=sample,
            top_k=rules.top_k if sample else 0,
            least=rules.least if sample else 1,
            ordered=sample and rules.ordered,
        )


jax.tree_util.register_dataclass(
    TracedRules,
    data_fields=["banned", "repetition_penalty", "temperature", "top_p", "log_min_p", "typical_p"],
    meta_fields=["normalized", "sample", "top_k", "least", "ordered"],
)


def mark_seen(seen: jax.Array, ids: jax.Array) -> jax.Array:
    """Marks ids [rows, any] in `seen`, bool [rows, vocab_size]; others than those of the vocabulary do not count."""
    return _put(seen, ids, True)


def process(logits: jax.Array, seen: jax.Array | None, rules: TracedRules) -> jax.Array:
    """The scores of all ids, with penalties and bans but before sampling: float32 [rows, vocab_size]."""
    scores = logits.astype(jnp.float32)
    if rules.normalized:
        scores = jax.nn.log_softmax(scores, axis=-1)
    if rules.repetition_penalty is not None:
        factor = rules.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * factor, scores / factor), scores)
    if rules.banned.shape[1]:
        scores = _put(scores, rules.banned, _IMPOSSIBLE)
    return scores


def narrow(scores: jax.Array, rules: TracedRules) -> tuple[jax.Array, jax.Array]:
    """What there is to draw from: scores and ids, each [rows, count], sorted only if that is needed."""
    scores = scores / rules.temperature
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    if rules.top_k:
        scores, ids = largest(scores, rules.top_k)
    elif rules.ordered:
        scores, ids = _sorted(-scores, scores, ids)
    if rules.top_p is not None:
        scores = _without(scores, _mass_before(jax.nn.softmax(scores, axis=-1)) >= rules.top_p, rules)
    if rules.log_min_p is not None:
        likeliest = scores.max(axis=-1, keepdims=True)
        scores = _without(scores, scores < likeliest + rules.log_min_p, rules)
    if rules.typical_p is not None:
        log_probabilities = jax.nn.log_softmax(scores, axis=-1)
        probabilities = jnp.exp(log_probabilities)
        information = jnp.where(probabilities > 0, probabilities * log_probabilities, 0)
        distance = jnp.abs(log_probabilities - information.sum(axis=-1, keepdims=True))
        scores, ids, probabilities = _sorted(distance, scores, ids, probabilities)
        scores = _without(scores, _mass_before(probabilities) >= rules.typical_p, rules)
    return scores, ids


def largest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest scores and their places, as `jax.lax.top_k`, in a fraction of its time.

    None of the `count` largest is outside the `count` groups of neighbours with the largest maxima, as each of these has
    one that comes first. The groups are kept in order, so that of equal ones the first place wins.

    Args:
        scores: float32 [rows, any].
        count: how many.

    Returns:
        float32 and int32, each [rows, count].
    """
    rows, width = scores.shape
    groups = -(-width // _GROUP)
    if groups <= count:
        return tuple(jax.lax.top_k(scores, count))
    padded = jnp.pad(scores, ((0, 0), (0, groups * _GROUP - width)), constant_values=_IMPOSSIBLE)
    grouped = padded.reshape(rows, groups, _GROUP)
    best = jnp.sort(jax.lax.top_k(grouped.max(axis=-1), count)[1], axis=-1)
    members = jnp.take_along_axis(grouped, best[:, :, None], axis=1).reshape(rows, -1)
    values, place = jax.lax.top_k(members, count)
    return values, jnp.take_along_axis(best, place // _GROUP, axis=1) * _GROUP + place % _GROUP


def noise_bits(keys: jax.Array, index: jax.Array) -> jax.Array:
    """See `xglm_core.generation.randomness.noise_bits`: uint32 [rows, any] of keys [rows, 2] and indices [rows, any]."""
    bits = index.astype(jnp.uint32) * np.uint32(GOLDEN) + keys[:, :1]
    return _mixed(_mixed(bits) ^ keys[:, 1:])


def gumbel(keys: jax.Array, index: jax.Array) -> jax.Array:
    """The noise of each index; see `xglm_core.generation.randomness`.

    Args:
        keys: two words, uint32 [rows, 2].
        index: int32 [rows, any].

    Returns:
        float32 [rows, any].
    """
    uniform = (noise_bits(keys, index).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-uniform))


def choose(scores: jax.Array, rules: TracedRules, keys: jax.Array) -> jax.Array:
    """An id of each row, or a code in its place, int32 [rows]; `keys` uint32 [rows, 2]."""
    broken = jnp.isnan(scores).any(axis=-1)
    empty = scores.max(axis=-1) == _IMPOSSIBLE
    if rules.sample:
        scores, ids = narrow(scores, rules)
        place = jnp.argmax(scores + gumbel(keys, ids), axis=-1)
        chosen = jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]
    else:
        chosen = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jnp.where(broken, NOT_A_NUMBER, jnp.where(empty, NOTHING_LEFT, chosen))


def choose_candidates(
    scores: jax.Array, rules: TracedRules, totals: jax.Array, keys: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The best continuations of each group of beams.

    Args:
        scores: float32 [groups * beams, vocab_size].
        rules: whether and from what to draw.
        totals: what to add to the scores of each beam, float32 [groups, beams].
        keys: of the groups, uint32 [groups, 2].
        count: how many.

    Returns:
        Totals with scores, float32, and beam * vocab_size + id, int32, each [groups, count]; NaN if there is any.
    """
    groups, beams = totals.shape
    vocab_size = scores.shape[1]
    # Differs: JAX does not say where NaN is among the largest.
    broken = jnp.isnan(scores).any(axis=-1).reshape(groups, beams).any(axis=-1, keepdims=True)
    if rules.sample:
        scores, ids = narrow(scores, rules)
    else:
        scores, ids = largest(scores, min(count, vocab_size))
    index = ids.reshape(groups, beams, -1) + jnp.arange(beams)[:, None] * vocab_size
    sums = (scores.reshape(index.shape) + totals[:, :, None]).reshape(groups, -1)
    index = index.reshape(groups, -1)
    _, place = largest(sums + gumbel(keys, index) if rules.sample else sums, count)
    sums, index = (jnp.take_along_axis(array, place, axis=1) for array in (sums, index))
    return jnp.where(broken, jnp.nan, sums), index


def narrowed(scores: jax.Array, rules: TracedRules) -> jax.Array:
    """The scores of all ids, minus infinity where there is nothing to draw: float32 [rows, vocab_size]."""
    if not rules.sample:
        return scores
    values, ids = narrow(scores, rules)
    return _put(jnp.full_like(scores, _IMPOSSIBLE), ids, values)


def _put(array: jax.Array, ids: jax.Array | np.ndarray, values: jax.Array | float) -> jax.Array:
    """An array [rows, width] with values at some places [rows, any] of each row; there are none beyond the width."""
    return array.at[jnp.arange(len(array))[:, None], ids].set(values, mode="drop")


def _sorted(order: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [rows, any] in ascending order of the first; equal ones stay in order."""
    return tuple(jax.lax.sort((order, *arrays), num_keys=1, is_stable=True)[1:])


def _mass_before(probabilities: jax.Array) -> jax.Array:
    """The sum of all entries before each one, in each row."""
    return jnp.cumsum(probabilities, axis=-1) - probabilities


def _without(scores: jax.Array, dropped: jax.Array, rules: TracedRules) -> jax.Array:
    """Minus infinity where `dropped`, except for the first entries, of which the rules keep a number in any case."""
    first = jnp.arange(scores.shape[1]) < rules.least
    return jnp.where(dropped & ~first if rules.ordered else dropped, _IMPOSSIBLE, scores)


def _mixed(bits: jax.Array) -> jax.Array:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(multiplier)
    return bits
