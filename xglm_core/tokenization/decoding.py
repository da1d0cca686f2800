"""From tokens to text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Set

_BEFORE_MARKS = re.compile(r" ([.?!,]|n't|'(?:m|s|ve|re)\b)")


def text_of(tokens: Iterable[str], byte_tokens: Set[str] = frozenset()) -> str:
    """The text of tokens.

    Args:
        tokens: the tokens; "▁" begins a word, but is not a space at the ends of the text.
        byte_tokens: the tokens that stand for bytes, such as "<0xE2>"; a run of them is UTF-8.
    """
    if byte_tokens:
        tokens = itertools.chain.from_iterable(
            [bytes(int(token[1:-1], 16) for token in run).decode(errors="replace")] if are_bytes else run
            for are_bytes, run in itertools.groupby(tokens, key=byte_tokens.__contains__)
        )
    return "".join(tokens).replace("▁", " ").strip(" ")


def tidied(text: str) -> str:
    """Removes the spaces before English punctuation and endings."""
    return _BEFORE_MARKS.sub(r"\1", text).replace(" ' ", "'")
