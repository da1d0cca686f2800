"""What ends a text early: stop strings, and the user's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xglm_core.errors import InputError

# A user's function: (tokens so far [rows, length], scores so far or None) -> whether to end, for all rows or for each.
Criterion = Callable[[Any, Any], Any]


class StopStrings:
    """Looks for strings in new text.

    Args:
        strings: the strings; may be empty.
        tokenizer: decodes ids.

    Raises:
        InputError: there are strings but no tokenizer, or the tokenizer's texts can never contain one of them.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        if strings and tokenizer is None:
            raise InputError("stop_strings needs the tokenizer; give generate(..., tokenizer=tokenizer)")
        for string in strings:
            # Between letters, because SentencePiece drops spaces at the ends.
            if string not in tokenizer.decode(tokenizer.encode(f"a{string}a"), skip_special_tokens=True):
                raise InputError(
                    f"stop_strings has {string!r}, which the tokenizer's texts never contain; newlines and repeated "
                    "spaces are not tokens of XGLM: its line break is </s>, which ends a row unless stop_at_eos=False"
                )
        self._strings = tuple(strings)
        self._tokenizer = tokenizer

    def found(self, sequence: Sequence[int], begin: int) -> bool:
        """Whether the text of the ids from `begin` on contains one of the strings."""
        if not self._strings:
            return False
        # Decoding begins one token earlier: otherwise a space at the start of the new text would be lost.
        before = self._decode(sequence[max(begin - 1, 0) : begin])
        new = self._decode(sequence[max(begin - 1, 0) :])[len(before) :]
        return any(string in new for string in self._strings)

    def _decode(self, ids: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded


def stopped(criteria: Sequence[Criterion], ids: Any, scores: tuple[Any, ...] | None) -> np.ndarray:
    """Which rows are ended by at least one of the user's functions.

    Args:
        criteria: the functions.
        ids: the tokens so far, the framework's tensor [rows, length].
        scores: the scores of each step, if they are recorded.

    Returns:
        bool [rows].

    Raises:
        InputError: a function returns anything but a bool, or one bool for each row.
    """
    result = np.zeros(ids.shape[0], bool)
    for place, criterion in enumerate(criteria):
        found = criterion(ids, scores)
        values = np.asarray(found.tolist() if hasattr(found, "tolist") else found)  # `tolist` works on any device.
        if values.dtype != bool or values.shape not in ((), result.shape):
            raise InputError(
                f"stopping_criteria[{place}] returned {values.dtype} {list(values.shape)}, expected True or False, or "
                f"one of them for each row [{len(result)}]"
            )
        result |= values
    return result
