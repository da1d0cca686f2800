"""Tokens that are found in a text before SentencePiece sees it: special tokens and added tokens."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from xglm_core.errors import InputError

# Matches from the first line break of a run to the last, with the white space in between.
_LINE_BREAKS = r"[\r\n](?:\s*[\r\n])?"


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched literally.

    Attributes:
        content: its text.
        special: whether `skip_special_tokens` drops it.
        single_word: whether it is found only where no letter, digit or "_" touches it.
        lstrip, rstrip, normalized: kept for the files. They change no id: SentencePiece drops the spaces around a
            token, and tokens are matched in the original text.
    """

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def of(cls, token: Any, *, special: bool = False) -> Self:
        """Makes a token from a string, an object with these attributes, or its description in a file.

        Raises:
            InputError: it is none of these, or is empty.
        """
        if isinstance(token, str):
            token = {"content": token}
        get = token.get if isinstance(token, Mapping) else functools.partial(getattr, token)
        values: dict[str, Any] = {name: get(name, default) for name, default in _DEFAULTS.items()}
        if not isinstance(values["content"], str) or not values["content"]:
            raise InputError(f"a token is {token!r:.80}, expected a string that is not empty")
        return cls(**{**values, "special": bool(values["special"] or special)})

    def __str__(self) -> str:
        return self.content

    def __eq__(self, other: object) -> bool:
        """Whether all attributes are equal; also compares with tokens of the `tokenizers` library."""
        try:
            return all(getattr(other, name) == getattr(self, name) for name in _DEFAULTS)
        except AttributeError:
            return NotImplemented

    def as_json(self) -> dict[str, Any]:
        """Its description in a file."""
        return asdict(self)


_DEFAULTS = asdict(AddedToken(""))


class TokenFinder:
    """Finds tokens in texts. At each place the longest one wins, but whole words come first.

    Args:
        tokens: the tokens and their ids.
    """

    def __init__(self, tokens: Iterable[tuple[AddedToken, int]]) -> None:
        self._ids: dict[str, int] = {}
        words: list[str] = []
        others: list[str] = []
        for token, number in tokens:
            self._ids[token.content] = number
            (words if token.single_word else others).append(token.content)
        self._first_characters = {content[0] for content in self._ids}
        pattern = _longest_of(others) if others else ""
        if words:
            pattern = "|".join(filter(None, [rf"(?<!\w)(?:{_longest_of(words)})(?!\w)", pattern]))
        self._tokens = re.compile(pattern or "(?!)")  # Matches nothing.
        self._tokens_and_breaks = re.compile("|".join(filter(None, [pattern, _LINE_BREAKS])))

    def may_find(self, text: str, *, line_breaks: bool) -> bool:
        """Whether a text may contain a token; several times faster than a search."""
        for character in self._first_characters:  # A loop takes half the time of `any`.
            if character in text:
                return True
        return line_breaks and ("\n" in text or "\r" in text)

    def split(self, text: str, line_break: int | None) -> Iterator[tuple[int, int, int | None]]:
        """Splits a text.

        Args:
            text: any text.
            line_break: the id that stands for a run of line breaks; None leaves them in the text.

        Yields:
            Begin and end of each part [characters], and its id, or None if it is not a token.
        """
        position = 0
        pattern = self._tokens if line_break is None else self._tokens_and_breaks
        for match in pattern.finditer(text):
            start, stop = match.span()
            if position < start:
                yield position, start, None
            yield start, stop, self._ids.get(match.group(), line_break)
            position = stop
        if position < len(text):
            yield position, len(text), None


def _longest_of(texts: list[str]) -> str:
    """A pattern for the longest of some texts, which looks at each character once, however many texts there are."""
    shared = os.path.commonprefix(texts)  # noqa: RUF071 - these are no paths
    rests: dict[str, list[str]] = {}
    for text in texts:
        rests.setdefault(text[len(shared) : len(shared) + 1], []).append(text[len(shared) :])
    may_end = rests.pop("", None) is not None
    branches = "|".join(map(_longest_of, rests.values()))
    return re.escape(shared) + (f"(?:{branches})" if branches else "") + ("?" if branches and may_end else "")
