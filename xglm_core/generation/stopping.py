"""What ends a text before its end: strings, and functions of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xglm_core.errors import InputError

# A user's function: the tokens so far [rows, length], and the scores so far or None -> whether to end, for all or each.
Criterion = Callable[[Any, Any], Any]


class StopStrings:
    """Looks for strings in new text.

    Args:
        strings: the strings; there may be none.
        tokenizer: makes text of ids.

    Raises:
        InputError: there are strings but no tokenizer, or no text of the tokenizer can contain one of them.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        if strings and tokenizer is None:
            raise InputError("stop_strings needs the tokenizer; give generate(..., tokenizer=tokenizer)")
        for string in strings:
            # Between letters, as SentencePiece drops spaces at the ends.
            if string not in tokenizer.decode(tokenizer.encode(f"a{string}a"), skip_special_tokens=True):
                raise InputError(
                    f"stop_strings has {string!r}, which the tokenizer's texts never contain; newlines and repeated "
                    "spaces are no tokens of XGLM: its line break is </s>, which ends a row unless stop_at_eos=False"
                )
        self._strings = tuple(strings)
        self._tokenizer = tokenizer

    def found(self, text: Sequence[int], begin: int) -> bool:
        """Whether the new part of a text, its ids from `begin` on, contains one of the strings."""
        if not self._strings:
            return False
        # With the token before, so that a space at the begin of the new text is not lost.
        before = self._decode(text[max(begin - 1, 0) : begin])
        new = self._decode(text[max(begin - 1, 0) :])[len(before) :]
        return any(string in new for string in self._strings)

    def _decode(self, ids: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded


def stopped(criteria: Sequence[Criterion], ids: Any, scores: tuple[Any, ...] | None) -> np.ndarray:
    """Which rows some of the user's functions end.

    Args:
        criteria: the functions.
        ids: the tokens so far, the framework's tensor [rows, length].
        scores: what each step chose from, if it is recorded.

    Returns:
        bool [rows].

    Raises:
        InputError: a function returns something else than a bool or one for each row.
    """
    result = np.zeros(ids.shape[0], bool)
    for place, criterion in enumerate(criteria):
        found = criterion(ids, scores)
        values = np.asarray(found.tolist() if hasattr(found, "tolist") else found)  # Wherever a tensor is.
        if values.dtype != bool or values.shape not in ((), result.shape):
            raise InputError(
                f"stopping_criteria[{place}] returned {values.dtype} {list(values.shape)}, expected True or False, or "
                f"one of them for each row [{len(result)}]"
            )
        result |= values
    return result
