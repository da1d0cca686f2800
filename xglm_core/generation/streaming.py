"""Decodes text token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import numpy as np

from xglm_core.errors import InputError

_UNFINISHED = "\ufffd"  # What an incomplete character is decoded as.


class GrowingText:
    """Decodes tokens that arrive one after another.

    Args:
        tokenizer: decodes ids.
        skip_special_tokens, newline: see its `decode`.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True, newline: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = {
            "skip_special_tokens": skip_special_tokens,
            "newline": newline,
            "clean_up_tokenization_spaces": False,  # It would change text that was already returned.
        }
        self._ids: list[int] = []
        self._text = ""

    def add(self, ids: Iterable[int]) -> str:
        """Takes more ids; returns the text that they add, or nothing until its characters are complete."""
        self._ids += [int(number) for number in ids]
        text = self._decoded()
        return "" if text.endswith(_UNFINISHED) else self._beyond(text)

    def rest(self) -> str:
        """The rest of the text, after the last ids."""
        return self._beyond(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids, **self._options) if self._ids else ""

    def _beyond(self, text: str) -> str:
        new, self._text = text[len(self._text) :], text
        return new


def texts_of(tokenizer: Any, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> Iterator[str]:
    """Yields the text of tokens piece by piece; joined, the pieces are what `decode` returns."""
    text = GrowingText(tokenizer, skip_special_tokens=skip_special_tokens)
    for token in tokens:
        yield text.add([token])
    yield text.rest()


class TextStreamer:
    """Prints a text while it is generated; for the argument `streamer` of `generate`.

    Args:
        tokenizer: decodes ids.
        skip_prompt: whether to print only new text.
        skip_special_tokens: whether special tokens are left out.
        file: where to print; None for the standard output.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, skip_special_tokens: bool = True, file: TextIO | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_prompt = skip_prompt
        self._skip_special_tokens = skip_special_tokens
        self._file = file
        self._text: GrowingText | None = None

    def put(self, value: np.ndarray) -> None:
        """Takes the prompt [1, length], or the next token [1].

        Raises:
            InputError: there are several rows.
        """
        if len(value) != 1:
            raise InputError(f"TextStreamer prints one row, but the batch has {len(value)}")
        is_prompt = self._text is None
        if self._text is None:
            self._text = GrowingText(self._tokenizer, skip_special_tokens=self._skip_special_tokens)
        new = self._text.add(np.ravel(value))
        if not (is_prompt and self._skip_prompt):
            self._print(new)

    def end(self) -> None:
        """Prints what is left, and a line break."""
        self._print((self._text.rest() if self._text is not None else "") + "\n")
        self._text = None

    def _print(self, text: str) -> None:
        print(text, end="", flush=True, file=self._file or sys.stdout)
