"""Checks the arguments of a tokenizer's calls, and brings them into one form."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from xglm_core.errors import InputError


def one_of(argument: str, value: Any, expected: tuple[str, ...]) -> str:
    """Returns the value of an argument.

    Raises:
        InputError: it is not an expected value.
    """
    if value not in expected:
        *others, last = map(repr, expected)
        raise InputError(f"{argument} is {value!r}, expected {', '.join(others)} or {last}")
    return str(value)


def warn(message: str) -> None:
    """Warns, with the location of the caller outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("xglm_core."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def as_batch(text: Any, text_pair: Any, words: bool) -> tuple[Sequence[Any], Sequence[Any] | None, bool]:
    """Returns the texts, the second texts of pairs or None, and whether a single text was given."""
    single = not isinstance(text, list | tuple) or bool(words and text and isinstance(text[0], str))
    texts = [text] if single else text
    pairs = None if text_pair is None else [text_pair] if single else text_pair
    if pairs is None and texts and all(_is_pair(item, words) for item in texts):
        texts, pairs = [first for first, _ in texts], [second for _, second in texts]
    if pairs is not None and (not isinstance(pairs, list | tuple) or len(pairs) != len(texts)):
        raise InputError(f"text_pair is {text_pair!r:.80}, expected a second text for each of {len(texts)}")
    for item in [*texts, *(pairs or [])] if words else ():
        if not isinstance(item, list | tuple):
            raise InputError(f"is_split_into_words: a text is {item!r:.80}, expected a list of words")
    return texts, pairs, single


def _is_pair(item: Any, words: bool) -> bool:
    """Whether an item of a batch is two texts."""
    if not isinstance(item, list | tuple) or len(item) != 2:
        return False
    return not words or all(isinstance(text, list | tuple) for text in item)


def as_lists(value: Any) -> Any:
    """Converts arrays and tensors of any framework to lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "numpy"):  # TensorFlow's.
        return value.numpy().tolist()
    return [as_lists(item) for item in value] if isinstance(value, list) else value
