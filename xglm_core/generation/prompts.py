"""The prompts of `generate`, checked and in the form that engines read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.inputs import check_attention_mask, check_cache_batch, check_has_tokens, check_input_ids, check_shapes
from xglm_core.rounding import rounded_up


@dataclass(frozen=True)
class Prompts:
    """What each row begins with.

    Attributes:
        columns: the ids as given, int64 [rows, length], with which the result begins; [rows, 0] for embeddings.
        tokens: what the model reads, without what a cache holds: ids int64 [rows, length] or embeddings float32
            [rows, length, d_model].
        mask: 1 for tokens, 0 for padding, int64 [rows, past + length].
        past: how many positions a given cache holds.
        masked: whether the caller gave an attention mask.
        dtype: the type of the result: that of the given ids, if it can hold all ids.
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
        """Checks the prompts of a call.

        Args:
            config: the model's configuration.
            input_ids: integers [rows, length], including the ids that a cache holds. Without ids and embeddings, the
                prompt is one row of one id, `first`.
            attention_mask: [rows, length], or [rows, past + length] with embeddings. None means the mask of the cache
                and no other padding, but see `without`.
            inputs_embeds: [rows, length, d_model], in place of ids, without what a cache holds.
            past: how many positions a given cache holds.
            past_rows: how many rows that cache has; a single one serves all prompts. None without a cache.
            past_mask: the mask of the cache [rows, past], or None.
            first: that id; None means `first_id(config)`.

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
        """Treats an id as padding where it begins or ends a row, unless the caller gave a mask.

        Between other ids it stays text, and what a cache holds stays as it was read. None changes nothing.

        Raises:
            InputError: a row has no other id to read.
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
    def sequences(self) -> tuple[list[int], ...]:
        """The ids of each row without padding, including cached ones; empty for embeddings."""
        if not self.columns.size:
            return tuple([] for _ in self.columns)
        return tuple(row[keep].tolist() for row, keep in zip(self.columns, self.mask != 0, strict=True))

    @property
    def longest(self) -> int:
        """The number of tokens of the longest row, including cached ones."""
        return int(self.mask.sum(axis=1).max())

    @property
    def fingerprints(self) -> list[bytes]:
        """Bytes that are equal for equal prompts."""
        if self.columns.size:
            return [np.array(sequence, "<i8").tobytes() for sequence in self.sequences]
        rows = zip(self.tokens, self.mask[:, self.past :] != 0, strict=True)
        return [row[keep].astype("<f4").tobytes() for row, keep in rows]

    def as_read(self, pad_id: int) -> np.ndarray:
        """`columns` as the model reads them: each row right-aligned, with `pad_id` on its left."""
        read = np.full_like(self.columns, pad_id)
        for row, sequence in zip(read, self.sequences, strict=True):
            row[len(row) - len(sequence) :] = sequence
        return read

    def left_padded(self, multiple: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
        """Pads all rows on the left, to a length that is a multiple of `multiple`.

        Returns:
            The padded `tokens`, and the mask of cached and new positions.
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
        """Where `left_padded` puts each position of `mask`.

        Returns:
            The new places, int64 [rows, past + length], 0 for padding; and the padded length.
        """
        _, mask = self.left_padded(multiple, 0)
        result = np.zeros_like(self.mask)
        result[self.mask != 0] = np.nonzero(mask)[1]  # Row by row, in order.
        return result, mask.shape[1]


def first_id(config: XGLMConfig) -> int | None:
    """The id of `</s>`, which precedes every text in training; None if the configuration has no such id."""
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, Sequence) else ends
    return end if config.decoder_start_token_id is None else config.decoder_start_token_id


def filled(rows: Sequence[Sequence[int]], pad_id: int) -> np.ndarray:
    """Pads rows of different lengths on the right: int64 [rows, longest]."""
    result = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    for place, row in zip(result, rows, strict=True):
        place[: len(row)] = row
    return result
