"""The surprisal of words."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

WORD_BEGIN = "▁"  # SentencePiece writes this for a space, and before a text.


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        text: the word as in the text, without white space around it; empty for a line break.
        begin, end: where it begins and ends in the text [characters].
        bits: its surprisal: the sum of -log2 p over its tokens.
    """

    text: str
    begin: int
    end: int
    bits: float


def words(
    text: str,
    tokens: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    log_probabilities: Sequence[float],
    special: Collection[str],
) -> list[Word]:
    """Joins tokens into words.

    A token that begins with "▁" begins a word, and a special token is a word of its own. In scripts without spaces a
    whole clause is one word, because the tokens do not show where words begin.

    Args:
        text: the text.
        tokens: all or some of its tokens, in order.
        offsets: where each token begins and ends [characters].
        log_probabilities: the log-probability of each token [nats].
        special: the tokens that are not text.
    """
    groups: list[list[int]] = []
    for place, token in enumerate(tokens):
        if not groups or token.startswith(WORD_BEGIN) or token in special or tokens[place - 1] in special:
            groups.append([])
        groups[-1].append(place)
    found = []
    for group in groups:
        begin, end = offsets[group[0]][0], offsets[group[-1]][1]
        span = text[begin:end]
        begin += len(span) - len(span.lstrip()) if span.strip() else 0
        end = begin + len(span.strip())
        nats = -math.fsum(log_probabilities[place] for place in group)
        found.append(Word(text[begin:end], begin, end, nats / math.log(2)))
    return found
