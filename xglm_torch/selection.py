"""From logits to tokens, on the device; see `xglm_core.generation.rules.Rules` for the steps and their order."""

from __future__ import annotations

import math

import torch

from xglm_core.generation.engine import NOT_A_NUMBER, NOTHING_LEFT
from xglm_core.generation.randomness import GOLDEN, MULTIPLIERS, SHIFTS
from xglm_core.generation.rules import Rules

_IMPOSSIBLE = -torch.inf
_WORD = 0xFFFFFFFF


def mark_seen(seen: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Marks ids [rows, any] in `seen`, bool [rows, vocab_size]; others than those of the vocabulary do not count."""
    # One more column, for what does not count.
    columns = torch.cat([seen, seen.new_zeros(len(seen), 1)], dim=1)
    return columns.scatter(1, ids.clamp(max=seen.shape[1]), True)[:, :-1]


def process(logits: torch.Tensor, seen: torch.Tensor | None, rules: Rules) -> torch.Tensor:
    """The scores of all ids, with penalties and bans but before sampling: float32 [rows, vocab_size]."""
    scores = logits.float()
    if rules.normalized:
        scores = scores.log_softmax(dim=-1)
    if rules.bias is not None:
        bias = torch.from_numpy(rules.bias).to(scores.device)
        scores = bias.expand_as(scores) if rules.forced else scores + bias
    if seen is not None and rules.penalized:
        factor = rules.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
    if rules.banned.shape[1]:
        banned = torch.from_numpy(rules.banned).long().to(scores.device)
        scores = scores.masked_fill(mark_seen(torch.zeros_like(scores, dtype=torch.bool), banned), _IMPOSSIBLE)
    return scores


def narrow(scores: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """What there is to draw from: scores and ids, each [rows, count], sorted only if that is needed."""
    scores = scores / rules.temperature
    ids = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    if rules.top_k:
        scores, ids = scores.topk(rules.top_k)
    elif rules.ordered:
        scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    if rules.top_p < 1:
        scores = _without(scores, _mass_before(scores.softmax(dim=-1)) >= rules.top_p, rules)
    if rules.min_p > 0:
        likeliest = scores.amax(dim=-1, keepdim=True)
        scores = _without(scores, scores < likeliest + math.log(rules.min_p), rules)
    if rules.typical_p < 1:
        log_probabilities = scores.log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        entropy = -torch.where(probabilities > 0, probabilities * log_probabilities, 0).sum(dim=-1, keepdim=True)
        place = (log_probabilities + entropy).abs().sort(dim=-1, stable=True).indices
        scores, ids = scores.gather(1, place), ids.gather(1, place)
        scores = _without(scores, _mass_before(probabilities.gather(1, place)) >= rules.typical_p, rules)
    return renormalized(scores, rules), ids


def renormalized(scores: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Scores [rows, any] as log-probabilities, if the rules say so; the choice of a row's token is the same."""
    if not rules.renormalized:
        return scores
    total = scores.logsumexp(dim=-1, keepdim=True)
    return scores - total.where(total > _IMPOSSIBLE, 0)  # There may be nothing left.


def gumbel(keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The noise of each index; see `xglm_core.generation.randomness`.

    Differs: there is no arithmetic of unsigned words, so that they are the lower halves of 64 bits.

    Args:
        keys: two words, int64 [rows, 2].
        index: int64 [rows, any].

    Returns:
        float32 [rows, any].
    """
    bits = (index * GOLDEN + keys[:, :1]) & _WORD
    uniform = (_mixed(_mixed(bits) ^ keys[:, 1:]).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def choose(scores: torch.Tensor, rules: Rules, keys: torch.Tensor) -> torch.Tensor:
    """An id of each row, or a code in its place, int64 [rows]; `keys` int64 [rows, 2]."""
    broken = scores.isnan().any(dim=-1)
    empty = scores.amax(dim=-1) == _IMPOSSIBLE
    if rules.sample:
        scores, ids = narrow(scores, rules)
        place = (scores + gumbel(keys, ids)).argmax(dim=-1, keepdim=True)
        chosen = ids.gather(1, place)[:, 0]
    else:
        chosen = scores.argmax(dim=-1)
    return chosen.masked_fill(empty, NOTHING_LEFT).masked_fill(broken, NOT_A_NUMBER)


def choose_candidates(
    scores: torch.Tensor, rules: Rules, totals: torch.Tensor, keys: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best continuations of each group of beams.

    Args:
        scores: float32 [groups * beams, vocab_size].
        rules: whether and from what to draw.
        totals: what to add to the scores of each beam, float32 [groups, beams].
        keys: of the groups, int64 [groups, 2].
        count: how many.

    Returns:
        Totals with scores, float32, and beam * vocab_size + id, int64, each [groups, count]; NaN first if there is any.
    """
    groups, beams = totals.shape
    vocab_size = scores.shape[1]
    if rules.sample:
        scores, ids = narrow(scores, rules)
    else:
        scores, ids = renormalized(scores, rules).topk(min(count, vocab_size))
    index = ids + (torch.arange(len(ids), device=ids.device) % beams * vocab_size)[:, None]
    sums = (scores.unflatten(0, (groups, beams)) + totals[:, :, None]).flatten(1)
    index = index.reshape(groups, -1)
    order = sums + gumbel(keys, index) if rules.sample else sums
    place = order.topk(count).indices
    return sums.gather(1, place), index.gather(1, place)


def narrowed(scores: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The scores of all ids, minus infinity where there is nothing to draw: float32 [rows, vocab_size]."""
    if not rules.sample:
        return renormalized(scores, rules)
    values, ids = narrow(scores, rules)
    return torch.full_like(scores, _IMPOSSIBLE).scatter(1, ids, values)


def _mass_before(probabilities: torch.Tensor) -> torch.Tensor:
    """The sum of all entries before each one, in each row."""
    return probabilities.cumsum(dim=-1) - probabilities


def _without(scores: torch.Tensor, dropped: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Minus infinity where `dropped`, except for the first entries, of which the rules keep a number in any case."""
    first = torch.arange(scores.shape[1], device=scores.device) < rules.least
    return scores.masked_fill(dropped & ~first if rules.ordered else dropped, _IMPOSSIBLE)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        bits = ((bits ^ (bits >> shift)) * multiplier) & _WORD
    return bits
