"""From logits to tokens, on the device; see `xglm_core.generation.rules.Rules` for the steps and their order."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import tensorflow as tf

from xglm_core.generation.engine import NOT_A_NUMBER, NOTHING_LEFT
from xglm_core.generation.randomness import GOLDEN, MULTIPLIERS, SHIFTS
from xglm_core.generation.rules import Rules

_IMPOSSIBLE = float("-inf")


# Differs: the rules of compiled code, in which whatever is no tensor is fixed.
@dataclasses.dataclass(frozen=True, eq=False)
class TFRules:
    """`Rules` for compiled code: other numbers need no other program.

    Attributes:
        banned: int32 [rows, width].
        numbers: those of `repetition_penalty`, `temperature`, `top_p`, `min_p` and `typical_p` that have an effect,
            float32 scalars; and `bias`, if there is any.
        normalized, renormalized, forced, sample, top_k, ordered, least: see `Rules`.
    """

    banned: tf.Tensor
    numbers: dict[str, tf.Tensor]
    normalized: bool
    renormalized: bool
    forced: bool
    sample: bool
    top_k: int
    ordered: bool
    least: int

    @classmethod
    def of(cls, rules: Rules) -> Self:
        """The same rules."""
        has_effect = {
            "bias": rules.bias is not None,
            "repetition_penalty": rules.penalized,
            "temperature": rules.sample,
            "top_p": rules.sample and rules.top_p < 1,
            "min_p": rules.sample and rules.min_p > 0,
            "typical_p": rules.sample and rules.typical_p < 1,
        }
        return cls(
            tf.constant(rules.banned),
            {name: tf.constant(getattr(rules, name), tf.float32) for name, acts in has_effect.items() if acts},
            rules.normalized,
            rules.renormalized,
            rules.forced,
            rules.sample,
            rules.top_k,
            rules.ordered,
            rules.least,
        )

    # TensorFlow's protocol for classes that its functions may take: what is fixed, and the tensors.
    def __tf_flatten__(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        fixed = (
            self.normalized,
            self.renormalized,
            self.forced,
            self.sample,
            self.top_k,
            self.ordered,
            self.least,
        )
        return fixed, (self.banned, self.numbers)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[Any, ...], components: tuple[Any, ...]) -> Self:
        return cls(*components, *metadata)


def mark_seen(seen: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """Marks ids [rows, any] in `seen`, bool [rows, vocab_size]; others than those of the vocabulary do not count."""
    rows, vocab_size = seen.shape
    # One more column, for what does not count.
    columns = tf.pad(seen, ((0, 0), (0, 1)))
    ids = tf.minimum(ids, vocab_size)
    places = tf.stack([tf.broadcast_to(tf.range(rows)[:, None], ids.shape), ids], axis=-1)
    return tf.tensor_scatter_nd_update(columns, places, tf.ones(ids.shape, tf.bool))[:, :-1]


def process(logits: tf.Tensor, seen: tf.Tensor, rules: TFRules) -> tf.Tensor:
    """The scores of all ids, with penalties and bans but before sampling: float32 [rows, vocab_size]."""
    scores = tf.cast(logits, tf.float32)
    if rules.normalized:
        scores = tf.nn.log_softmax(scores)
    if "bias" in rules.numbers:
        bias = rules.numbers["bias"]
        scores = tf.broadcast_to(bias, scores.shape) if rules.forced else scores + bias
    if "repetition_penalty" in rules.numbers:
        factor = rules.numbers["repetition_penalty"]
        scores = tf.where(seen, tf.where(scores < 0, scores * factor, scores / factor), scores)
    if rules.banned.shape[1]:
        banned = mark_seen(tf.zeros(scores.shape, tf.bool), rules.banned)
        scores = tf.where(banned, _IMPOSSIBLE, scores)
    return scores


def narrow(scores: tf.Tensor, rules: TFRules) -> tuple[tf.Tensor, tf.Tensor]:
    """What there is to draw from: scores and ids, each [rows, count], sorted only if that is needed."""
    scores = scores / rules.numbers["temperature"]
    ids = tf.broadcast_to(tf.range(scores.shape[1]), scores.shape)
    if rules.ordered:  # The lower id first where scores are the same.
        scores, ids = tf.math.top_k(scores, rules.top_k or scores.shape[1])
    if "top_p" in rules.numbers:
        scores = _without(scores, _mass_before(tf.nn.softmax(scores)) >= rules.numbers["top_p"], rules)
    if "min_p" in rules.numbers:
        likeliest = tf.reduce_max(scores, axis=-1, keepdims=True)
        scores = _without(scores, scores < likeliest + tf.math.log(rules.numbers["min_p"]), rules)
    if "typical_p" in rules.numbers:
        log_probabilities = tf.nn.log_softmax(scores)
        probabilities = tf.exp(log_probabilities)
        information = tf.where(probabilities > 0, probabilities * log_probabilities, 0.0)
        entropy = -tf.reduce_sum(information, axis=-1, keepdims=True)
        place = tf.argsort(tf.abs(log_probabilities + entropy), stable=True)
        scores, ids = tf.gather(scores, place, batch_dims=1), tf.gather(ids, place, batch_dims=1)
        mass = _mass_before(tf.gather(probabilities, place, batch_dims=1))
        scores = _without(scores, mass >= rules.numbers["typical_p"], rules)
    return renormalized(scores, rules), ids


def renormalized(scores: tf.Tensor, rules: TFRules) -> tf.Tensor:
    """Scores [rows, any] as log-probabilities, if the rules say so; the choice of a row's token is the same."""
    if not rules.renormalized:
        return scores
    total = tf.reduce_logsumexp(scores, axis=-1, keepdims=True)
    return scores - tf.where(total > _IMPOSSIBLE, total, 0.0)  # There may be nothing left.


def gumbel(keys: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """The noise of each index; see `xglm_core.generation.randomness`.

    Args:
        keys: two words, uint32 [rows, 2].
        index: int32 [rows, any].

    Returns:
        float32 [rows, any].
    """
    uniform = (tf.cast(noise_bits(keys, index), tf.float32) + 0.5) * 2.0**-32
    return -tf.math.log(-tf.math.log1p(-uniform))


def noise_bits(keys: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """See `xglm_core.generation.randomness.noise_bits`: uint32 [rows, any]."""
    bits = tf.cast(index, tf.uint32) * GOLDEN + keys[:, :1]
    return _mixed(tf.bitwise.bitwise_xor(_mixed(bits), keys[:, 1:]))


def choose(scores: tf.Tensor, rules: TFRules, keys: tf.Tensor) -> tf.Tensor:
    """An id of each row, or a code in its place, int32 [rows]; `keys` uint32 [rows, 2]."""
    broken = tf.reduce_any(tf.math.is_nan(scores), axis=-1)
    empty = tf.reduce_max(scores, axis=-1) == _IMPOSSIBLE
    if rules.sample:
        scores, ids = narrow(scores, rules)
        place = tf.argmax(scores + gumbel(keys, ids), axis=-1, output_type=tf.int32)
        chosen = tf.gather(ids, place, batch_dims=1)
    else:
        chosen = tf.argmax(scores, axis=-1, output_type=tf.int32)
    return tf.where(broken, NOT_A_NUMBER, tf.where(empty, NOTHING_LEFT, chosen))


def choose_candidates(
    scores: tf.Tensor, rules: TFRules, totals: tf.Tensor, keys: tf.Tensor, count: int
) -> tuple[tf.Tensor, tf.Tensor]:
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
    rows, vocab_size = scores.shape
    # Differs: NaN may be the largest or the smallest number of XLA.
    broken = tf.reduce_any(tf.math.is_nan(tf.reshape(scores, (groups, -1))), axis=-1, keepdims=True)
    if rules.sample:
        scores, ids = narrow(scores, rules)
    else:
        scores, ids = tf.math.top_k(renormalized(scores, rules), min(count, vocab_size))
    index = tf.reshape(ids + (tf.range(rows) % beams * vocab_size)[:, None], (groups, -1))
    sums = tf.reshape(tf.reshape(scores, (groups, beams, -1)) + totals[:, :, None], (groups, -1))
    order = sums + gumbel(keys, index) if rules.sample else sums
    place = tf.math.top_k(order, count).indices
    best = tf.gather(sums, place, batch_dims=1)
    return tf.where(broken, float("nan"), best), tf.gather(index, place, batch_dims=1)


def narrowed(scores: tf.Tensor, rules: TFRules) -> tf.Tensor:
    """The scores of all ids, minus infinity where there is nothing to draw: float32 [rows, vocab_size]."""
    if not rules.sample:
        return renormalized(scores, rules)
    values, ids = narrow(scores, rules)
    places = tf.stack([tf.broadcast_to(tf.range(scores.shape[0])[:, None], ids.shape), ids], axis=-1)
    return tf.tensor_scatter_nd_update(tf.fill(scores.shape, _IMPOSSIBLE), places, values)


def _mass_before(probabilities: tf.Tensor) -> tf.Tensor:
    """The sum of all entries before each one, in each row."""
    return tf.cumsum(probabilities, axis=-1) - probabilities


def _without(scores: tf.Tensor, dropped: tf.Tensor, rules: TFRules) -> tf.Tensor:
    """Minus infinity where `dropped`, except for the first entries, of which the rules keep a number in any case."""
    first = tf.range(scores.shape[1]) < rules.least
    return tf.where(dropped & ~first if rules.ordered else dropped, _IMPOSSIBLE, scores)


def _mixed(bits: tf.Tensor) -> tf.Tensor:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint32))) * multiplier
    return bits
