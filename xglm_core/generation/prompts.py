"""The texts that `generate` continues, in the form in which engines read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.inputs import check_attention_mask, check_cache_batch, check_has_tokens, check_input_ids, check_shapes


@dataclass(frozen=True)
class Prompts:
    """What each row begins with.

    Attributes:
        columns: what the result begins with: the ids as given, int64 [rows, length]; of embeddings nothing, [rows, 0].
        tokens: what is to be read, ids int64 [rows, length] or embeddings float32 [rows, length, d_model]; without what
            a cache holds.
        mask: 1 for tokens, 0 for padding, int64 [rows, past + length].
        past: positions that a given cache holds.
        masked: whether the caller said what is padding.
        dtype: of the result: that of the given ids, if it can hold all ids.
    """

    columns: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    past: int
    masked: bool
    dtype: np.dtype[Any]

    @classmethod
    def of(
        cls,
        config: XGLMConfig,
        input_ids: np.ndarray | None,
        attention_mask: np.ndarray | None,
        inputs_embeds: np.ndarray | None = None,
        past: int = 0,
        past_rows: int | None = None,
        past_mask: np.ndarray | None = None,
        first: int | None = None,
    ) -> Prompts:
        """Checks what a caller gives.

        Args:
            config: the model's configuration.
            input_ids: integers [rows, length], those that a cache holds included. None with nothing in its place is one
                row of one token.
            attention_mask: [rows, length], of embeddings [rows, past + length]; None for what the cache has and no
                other padding, but see `without`.
            inputs_embeds: [rows, length, d_model], in place of ids, without what a cache holds.
            past: positions that a given cache holds.
            past_rows: rows of that cache, one of which serves all prompts; None if there is none.
            past_mask: the mask of these [rows, past], or None.
            first: the id of a row of one token; None means `first_id(config)`.

        Raises:
            InputError: the shapes do not fit, ids are outside the vocabulary, a row has no token, or there is nothing
                beyond what the cache holds.
        """
        if input_ids is None and inputs_embeds is None and attention_mask is None and not past:
            first = first_id(config) if first is None else first
            if first is not None:
                input_ids, attention_mask = np.array([[first]]), np.ones((1, 1), np.int64)
        check_shapes(
            config,
            {
                "input_ids": None if input_ids is None else input_ids.shape,
                "inputs_embeds": None if inputs_embeds is None else inputs_embeds.shape,
            },
        )
        if inputs_embeds is not None:
            rows, length = len(inputs_embeds), past + inputs_embeds.shape[1]
            columns: np.ndarray = np.zeros((rows, 0), np.int64)
            tokens: np.ndarray = inputs_embeds.astype(np.float32)
        else:
            assert input_ids is not None  # As `check_shapes` says.
            check_input_ids(input_ids, config)
            rows, length = input_ids.shape
            columns = input_ids.astype(np.int64)
            tokens = columns[:, past:]
            if length <= past:
                raise InputError(
                    f"input_ids has {length} columns, of which past_key_values holds {past}; expected all of the text, "
                    "and at least one token that was not read yet"
                )
        if past_rows not in (None, 1):
            check_cache_batch(past_rows, rows)
        if attention_mask is None:
            mask = np.ones((rows, length), np.int64)
            if past_mask is not None:
                mask[:, :past] = past_mask
        else:
            check_attention_mask(attention_mask.shape, rows, 0, length)
            mask = (np.asarray(attention_mask) != 0).astype(np.int64)
        check_has_tokens(mask[:, past:])
        dtype: np.dtype[Any] = np.dtype(np.int64)
        if input_ids is not None and np.iinfo(input_ids.dtype).max >= config.vocab_size - 1:
            dtype = input_ids.dtype
        return cls(columns, tokens, mask, past, attention_mask is not None, dtype)

    def without(self, padding: int | None) -> Prompts:
        """The prompts with this id as padding where it begins or ends a row, if the caller did not say what is padding.

        Between other ids it is text, and what a cache holds is as it was read. None changes nothing.

        Raises:
            InputError: a row has nothing else to be read.
        """
        if self.masked or padding is None or not self.columns.size:
            return self
        others = self.columns != padding
        # Whether there is another id up to here, and from here on.
        before, after = np.maximum.accumulate(others, axis=1), np.maximum.accumulate(others[:, ::-1], axis=1)[:, ::-1]
        mask = np.concatenate([self.mask[:, : self.past], (before & after)[:, self.past :]], axis=1).astype(np.int64)
        empty = np.flatnonzero(~mask[:, self.past :].any(axis=1))
        if len(empty):
            raise InputError(
                f"input_ids[{empty[0]}] has nothing to read but pad_token_id={padding}, which without attention_mask "
                "is padding; expected a token, or an attention_mask that is 1 where it is text"
            )
        return replace(self, mask=mask)

    @cached_property
    def texts(self) -> tuple[list[int], ...]:
        """The ids of each row, cached ones included, without padding; empty for embeddings."""
        if not self.columns.size:
            return tuple([] for _ in self.columns)
        return tuple(row[keep].tolist() for row, keep in zip(self.columns, self.mask != 0, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, cached ones included."""
        return int(self.mask.sum(axis=1).max())

    @property
    def contents(self) -> list[bytes]:
        """What distinguishes the rows, as bytes."""
        if self.columns.size:
            return [np.array(text, "<i8").tobytes() for text in self.texts]
        rows = zip(self.tokens, self.mask[:, self.past :] != 0, strict=True)
        return [row[keep].astype("<f4").tobytes() for row, keep in rows]

    def as_read(self, filler: int) -> np.ndarray:
        """`columns` as the model reads them: the tokens of each row at its right end, `filler` before them."""
        read = np.full_like(self.columns, filler)
        for row, text in zip(read, self.texts, strict=True):
            row[len(row) - len(text) :] = text
        return read

    def left_padded(self, multiple: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
        """Moves the tokens of each row to its right end, in order, and rounds the length up to a multiple.

        Returns:
            `tokens` in that order, and the mask of cached and new positions.
        """
        new = self.mask[:, self.past :] != 0
        length = rounded_up(int(new.sum(axis=1).max()), multiple)
        shape = (len(self.tokens), length, *self.tokens.shape[2:])
        tokens = np.full(shape, pad if self.columns.size else 0, self.tokens.dtype)
        mask = np.zeros(shape[:2], np.int64)
        for row, keep in enumerate(new):
            kept = self.tokens[row][keep]
            tokens[row, length - len(kept) :] = kept
            mask[row, length - len(kept) :] = 1
        return tokens, np.concatenate([self.mask[:, : self.past], mask], axis=1)

    def places(self, multiple: int) -> tuple[np.ndarray, int]:
        """Where `left_padded` puts the positions of `mask`.

        Returns:
            Places int64 [rows, past + length], 0 of padding; and how many there are.
        """
        _, mask = self.left_padded(multiple, 0)
        result = np.zeros_like(self.mask)
        result[self.mask != 0] = np.nonzero(mask)[1]  # Row by row, in order.
        return result, mask.shape[1]


def first_id(config: XGLMConfig) -> int | None:
    """What the tokenizer puts before every text, and training did: `</s>`. None if the configuration has no such id."""
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, Sequence) else ends
    return end if config.decoder_start_token_id is None else config.decoder_start_token_id


def rounded_up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def filled(rows: Sequence[Sequence[int]], filler: int) -> np.ndarray:
    """Rows of different lengths as an array, int64 [rows, longest]."""
    result = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for place, row in zip(result, rows, strict=True):
        place[: len(row)] = row
    return result
