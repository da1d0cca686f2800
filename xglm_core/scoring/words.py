"""Surprisal of words."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

WORD_BEGIN = "▁"  # What SentencePiece writes for a space, and before a text.


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        text: the word as it stands in the text, without white space around it; empty for a line break.
        begin, end: where it stands [characters].
        bits: its surprisal, the sum of -log2 p of its tokens.
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
    """Joins tokens to words.

    A word begins with each token that begins with "▁". A special token is a word of its own. Where a script writes no
    spaces, a whole clause is one word: nothing here knows where its words would begin.

    Args:
        text: what was divided into tokens.
        tokens: all or some of its tokens, in order.
        offsets: begin and end of each [characters].
        log_probabilities: of each, natural.
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
