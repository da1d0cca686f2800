"""Truncation and padding of rows of tokens.

The properties of tokens are kept in columns: each name, such as "input_ids", has one row per text, with one entry per
token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xglm_core.errors import InputError
from xglm_core.rounding import rounded_up

Columns = dict[str, list[list[Any]]]
Span = tuple[int, int]  # Begin and end [tokens].

STRATEGIES = ("longest_first", "only_first", "only_second")

# The entries of other columns than ids for added special tokens, and for padding.
SPECIAL = {
    "offset_mapping": (0, 0),
    "word_ids": None,
    "sequence_ids": None,
    "special_tokens_mask": 1,
    "token_type_ids": 0,
}
PADDING = SPECIAL | {"attention_mask": 0}


@dataclass(frozen=True)
class Truncation:
    """How to truncate texts.

    Args:
        room: the largest number of tokens of a text, or of both texts of a pair together, without special tokens.
        strategy: "longest_first" shortens the longer text of a pair until both are of one length, then both in turn,
            the second first; "only_first" and "only_second" shorten one.
        side: "right" drops the last tokens, "left" the first ones.
        stride: the number of tokens that an overflowing row repeats of its neighbour.
        overflow: whether to return dropped tokens in rows of their own.
    """

    room: int
    strategy: str
    side: str
    stride: int = 0
    overflow: bool = False

    def spans(self, first: int, second: int | None) -> list[tuple[Span, Span | None]]:
        """The parts to keep of a text of `first` tokens, or of a pair; several with overflow.

        Raises:
            InputError: the text to shorten is too short, or its windows would not advance.
        """
        excess = first + (second or 0) - self.room
        if excess <= 0:
            return [((0, first), None if second is None else (0, second))]
        if second is None:
            if self.strategy == "only_second":
                raise InputError("truncation is 'only_second', but there is no second text")
            return [(span, None) for span in self._windows(first, first - excess)]
        if self.strategy == "only_first":
            return [(span, (0, second)) for span in self._windows(first, first - excess)]
        if self.strategy == "only_second":
            return [((0, first), span) for span in self._windows(second, second - excess)]
        if self.overflow:
            raise InputError(
                "return_overflowing_tokens: of a pair, only one text can overflow; "
                "set truncation='only_first' or 'only_second'"
            )
        half = (self.room + 1) // 2
        kept = min(first, max(half, self.room - second))
        return [(self._windows(first, kept)[0], self._windows(second, self.room - kept)[0])]

    def _windows(self, length: int, size: int) -> list[Span]:
        """Windows of at most `size` tokens; truncation keeps the first one."""
        if size < 0:
            raise InputError(
                f"truncation is {self.strategy!r}, but of {length} tokens {length - size} would have to go; "
                "raise max_length"
            )
        if not self.overflow:
            return [(0, size) if self.side == "right" else (length - size, length)]
        if self.stride >= size:
            raise InputError(f"stride is {self.stride}, expected less than the {size} tokens that fit beside it")
        spans = []
        for start in range(0, length, size - self.stride):
            spans.append((start, min(start + size, length)))
            if start + size >= length:
                break
        return spans if self.side == "right" else [(length - stop, length - start) for start, stop in spans]


def truncated(
    first: Columns, second: Columns | None, truncation: Truncation
) -> tuple[Columns, Columns | None, list[int]]:
    """Truncates rows; returns them, and the index of the text of each row."""
    lengths = [len(row) for row in first["input_ids"]]
    others = [None] * len(lengths) if second is None else [len(row) for row in second["input_ids"]]
    spans = [
        (text, *parts)
        for text, (length, other) in enumerate(zip(lengths, others, strict=True))
        for parts in truncation.spans(length, other)
    ]
    rows = _take(first, [(text, part) for text, part, _ in spans])
    if second is not None:
        second = _take(second, [(text, part) for text, _, part in spans if part is not None])
    return rows, second, [text for text, _, _ in spans]


def regrouped(rows: list[list[Any]], counts: list[int]) -> list[list[Any]]:
    """Joins the rows of words into rows of texts."""
    remaining = iter(rows)
    return [list(itertools.chain.from_iterable(itertools.islice(remaining, count))) for count in counts]


def pad(columns: Columns, *, length: int | None, multiple_of: int | None, side: str, pad_token_id: int) -> Columns:
    """Pads all rows to one length.

    Args:
        columns: `input_ids`, and others with as many entries in each row; values that are not rows stay as they are.
        length: the length [tokens], which longer rows exceed; None means that of the longest row.
        multiple_of: the length is rounded up to a multiple of this; None means 1.
        side: "right" or "left".
        pad_token_id: the id to pad with.

    Raises:
        InputError: `multiple_of` is less than 1.
    """
    rows = columns["input_ids"]
    if length is None:
        length = max(map(len, rows), default=0)
    if multiple_of is not None:
        if multiple_of < 1:
            raise InputError(f"pad_to_multiple_of is {multiple_of}, expected at least 1")
        length = rounded_up(length, multiple_of)
    missing = [length - len(row) for row in rows]
    padded = dict(columns)
    for name, value in {"input_ids": pad_token_id, **PADDING}.items():
        if name in columns:
            filler = [value]
            padded[name] = [
                row + filler * count if side == "right" else filler * count + row
                for row, count in zip(columns[name], missing, strict=True)
            ]
    return padded


def _take(columns: Columns, spans: Sequence[tuple[int, Span]]) -> Columns:
    """The rows of some texts, each cut to a span; a text may occur several times."""
    return {name: [rows[text][start:stop] for text, (start, stop) in spans] for name, rows in columns.items()}
