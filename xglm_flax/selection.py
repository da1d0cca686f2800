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
_LEAST_WIDTH = 64  # Candidates to sort, so that most values of `top_k` share a program.
_UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class TracedRules:
    """`Rules` as compiled code takes them.

    Differs: which costly steps there are is compiled, while numbers are traced. Cheap steps are always there, with
    numbers that change nothing.

    Attributes:
        banned: ids, int32 [rows, width].
        bias: float32 [rows or 1, vocab_size]; None for none.
        repetition_penalty, temperature, top_p, typical_p, top_k, least: see `Rules`; None where there is no such step.
        log_min_p: logarithm of `Rules.min_p`.
        normalized, renormalized, forced, sample: see `Rules`.
        width: how many candidates to sort, a power of two; 0 if the limits do not need their order.
    """

    banned: jax.Array | np.ndarray
    bias: jax.Array | np.ndarray | None
    repetition_penalty: np.float32 | None
    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    log_min_p: np.float32
    typical_p: np.float32 | None
    least: np.int32
    normalized: bool
    renormalized: bool
    forced: bool
    sample: bool
    width: int

    @classmethod
    def of(cls, rules: Rules) -> TracedRules:
        """The same rules."""
        ordered, limited = rules.sample and rules.ordered, rules.sample and rules.typical_p < 1
        return cls(
            banned=rules.banned,
            bias=rules.bias,
            repetition_penalty=np.float32(rules.repetition_penalty) if rules.penalized else None,
            temperature=np.float32(rules.temperature),
            top_k=np.int32(rules.top_k or _UNLIMITED),
            # Sums of all probabilities may round to 1 before the last.
            top_p=np.float32(rules.top_p if rules.top_p < 1 else np.inf),
            log_min_p=np.float32(math.log(rules.min_p) if rules.min_p > 0 else -np.inf),
            typical_p=np.float32(rules.typical_p) if limited else None,
            least=np.int32(rules.least),
            normalized=rules.normalized,
            renormalized=rules.renormalized,
            forced=rules.forced,
            sample=rules.sample,
            width=1 << (max(rules.top_k or _UNLIMITED, _LEAST_WIDTH) - 1).bit_length() if ordered else 0,
        )


jax.tree_util.register_dataclass(
    TracedRules,
    data_fields=[
        "banned",
        "bias",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "log_min_p",
        "typical_p",
        "least",
    ],
    meta_fields=["normalized", "renormalized", "forced", "sample", "width"],
)


def mark_seen(seen: jax.Array, ids: jax.Array) -> jax.Array:
    """Marks ids [rows, any] in `seen`, bool [rows, vocab_size]; others than those of the vocabulary do not count."""
    return _put(seen, ids, True)


def process(logits: jax.Array, seen: jax.Array | None, rules: TracedRules) -> jax.Array:
    """The scores of all ids, with penalties and bans but before sampling: float32 [rows, vocab_size]."""
    scores = logits.astype(jnp.float32)
    if rules.normalized:
        scores = jax.nn.log_softmax(scores, axis=-1)
    if rules.bias is not None:
        scores = jnp.broadcast_to(rules.bias, scores.shape) if rules.forced else scores + rules.bias
    if rules.repetition_penalty is not None:
        assert seen is not None  # As the prefill was told.
        factor = rules.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * factor, scores / factor), scores)
    if rules.banned.shape[1]:
        scores = _put(scores, rules.banned, _IMPOSSIBLE)
    return scores


def narrow(scores: jax.Array, rules: TracedRules) -> tuple[jax.Array, jax.Array]:
    """What there is to draw from: scores and ids, each [rows, count], sorted only if there are fewer than all.

    Differs: on a CPU, XLA takes 30 times as long to sort pairs as to sort integers. So of all scores only the values
    are sorted, which tells how many are kept and which is the last of them.
    """
    scores = scores / rules.temperature
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    if not rules.width:
        scores = jnp.where(scores < scores.max(axis=-1, keepdims=True) + rules.log_min_p, _IMPOSSIBLE, scores)
    elif rules.width < scores.shape[1]:
        scores, ids = jax.lax.top_k(scores, rules.width)
        scores = jnp.where(jnp.arange(rules.width)[None] < _count(scores, rules), scores, _IMPOSSIBLE)
    else:
        values = _descending(scores)
        scores = jnp.where(_first(scores, values, _count(values, rules)), scores, _IMPOSSIBLE)
    if rules.typical_p is not None:
        log_probabilities = jax.nn.log_softmax(scores, axis=-1)
        probabilities = jnp.exp(log_probabilities)
        information = jnp.where(probabilities > 0, probabilities * log_probabilities, 0)
        distance = jnp.abs(log_probabilities - information.sum(axis=-1, keepdims=True))
        _, scores, ids, probabilities = jax.lax.sort((distance, scores, ids, probabilities), num_keys=1, is_stable=True)
        dropped = (_mass_before(probabilities) >= rules.typical_p) & (jnp.arange(scores.shape[1])[None] >= rules.least)
        scores = jnp.where(dropped, _IMPOSSIBLE, scores)
    return renormalized(scores, rules), ids


def renormalized(scores: jax.Array, rules: TracedRules) -> jax.Array:
    """Scores [rows, any] as log-probabilities, if the rules say so; the choice of a row's token is the same."""
    if not rules.renormalized:
        return scores
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return scores - jnp.where(total > _IMPOSSIBLE, total, 0)  # There may be nothing left.


def noise_bits(keys: jax.Array, index: jax.Array) -> jax.Array:
    """See `xglm_core.generation.randomness.noise_bits`: uint32 [rows, any] of keys [rows, 2], indices [rows, any]."""
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
    likeliest = scores.max(axis=-1)
    broken, empty = jnp.isnan(likeliest), likeliest == _IMPOSSIBLE
    if rules.sample:
        scores, ids = narrow(scores, rules)
        place = _first_largest(scores + gumbel(keys, ids))
        chosen = jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]
    else:
        chosen = _first_largest(scores)
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
        scores, ids = jax.lax.top_k(renormalized(scores, rules), min(count, vocab_size))
    index = ids.reshape(groups, beams, -1) + jnp.arange(beams, dtype=jnp.int32)[None, :, None] * vocab_size
    sums = (scores.reshape(index.shape) + totals[:, :, None]).reshape(groups, -1)
    index = index.reshape(groups, -1)
    _, place = jax.lax.top_k(sums + gumbel(keys, index) if rules.sample else sums, count)
    sums, index = (jnp.take_along_axis(array, place, axis=1) for array in (sums, index))
    return jnp.where(broken, jnp.nan, sums), index


def narrowed(scores: jax.Array, rules: TracedRules) -> jax.Array:
    """The scores of all ids, minus infinity where there is nothing to draw: float32 [rows, vocab_size]."""
    if not rules.sample:
        return renormalized(scores, rules)
    values, ids = narrow(scores, rules)
    return _put(jnp.full_like(scores, _IMPOSSIBLE), ids, values)


def _put(array: jax.Array, ids: jax.Array | np.ndarray, values: jax.Array | float) -> jax.Array:
    """An array [rows, width] with values at some places [rows, any] of each row; there are none beyond the width."""
    return array.at[jnp.arange(len(array))[:, None], ids].set(values, mode="drop")


def _first_largest(scores: jax.Array) -> jax.Array:
    """The place of the largest of each row, int32 [rows]; on a CPU, `jnp.argmax` takes several times as long."""
    is_largest = scores == scores.max(axis=-1, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where(is_largest, places, scores.shape[1]).min(axis=-1)


def _count(values: jax.Array, rules: TracedRules) -> jax.Array:
    """How many `top_k`, `top_p` and `min_p` keep of the largest scores [rows, any], descending: int32 [rows, 1]."""
    values = jnp.where(jnp.arange(values.shape[1])[None] < rules.top_k, values, _IMPOSSIBLE)
    probable = (_mass_before(jax.nn.softmax(values, axis=-1)) < rules.top_p).sum(axis=-1, keepdims=True)
    near = (values >= values[:, :1] + rules.log_min_p).sum(axis=-1, keepdims=True)
    return jnp.minimum(jnp.maximum(jnp.minimum(probable, near), rules.least), rules.top_k)


def _descending(scores: jax.Array) -> jax.Array:
    """Scores [rows, any] from the largest to the smallest."""

    def toggled(bits: jax.Array) -> jax.Array:
        """Between the bits of float32 numbers and integers in the same order."""
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    order = jnp.sort(~toggled(jax.lax.bitcast_convert_type(scores, jnp.int32)), axis=-1)
    return jax.lax.bitcast_convert_type(toggled(~order), jnp.float32)


def _first(scores: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
    """Which scores [rows, any] are the first `count` [rows, 1] of `values`; of equal ones the first."""
    last = jnp.take_along_axis(values, count - 1, axis=1)
    above, level = scores > last, scores == last
    return above | (level & (jnp.cumsum(level, axis=-1) <= count - above.sum(axis=-1, keepdims=True)))


def _mass_before(probabilities: jax.Array) -> jax.Array:
    """The sum of all entries before each one, in each row."""
    return jnp.cumsum(probabilities, axis=-1) - probabilities


def _mixed(bits: jax.Array) -> jax.Array:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(multiplier)
    return bits
