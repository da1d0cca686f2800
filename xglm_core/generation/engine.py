"""What a backend brings to generation: compiled code behind a small protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from xglm_core.errors import InputError
from xglm_core.generation.rules import Rules

# Tokens to ask for between two looks at the end-of-text ids: rows that ended waste at most this many steps.
BLOCK = 16

# What `Engine.select` and `Engine.advance` give in place of an id.
NOT_A_NUMBER = -1  # The row's logits are not numbers.
NOTHING_LEFT = -2  # All ids are banned.

# A user's hook: the tokens so far [rows, length] and the logits [rows, vocab_size] -> logits, tensors of the framework.
Processor = Callable[[Any, Any], Any]


class Engine(Protocol):
    """The state of one call: a cache, and the logits of what was read last, which both stay on the device.

    Attributes:
        bucket: prompt lengths and capacities are rounded up to multiples of this many tokens, so that compiled code is
            reused; 1 where shapes are free.
        logits: of the last token of each row, the framework's tensor [rows, vocab_size].
    """

    bucket: int
    logits: Any

    def prefill(self, tokens: np.ndarray, attention_mask: np.ndarray, capacity: int, seen: np.ndarray | None) -> None:
        """Reads the prompts.

        Args:
            tokens: padded on the left, ids int64 [rows, length] or embeddings float32 [rows, length, d_model].
            attention_mask: 1 for tokens, 0 for padding, of cached and new positions, int64 [rows, past + length].
            capacity: positions that the cache must hold.
            seen: the ids that each row contains, for the repetition penalty, int32 [rows, any]; `vocab_size` where
                there is none. None if nobody will ask.
        """

    def reorder(self, rows: np.ndarray) -> None:
        """Continues with these rows of the present ones, int64 [new rows]; one may be taken several times."""

    def feed(self, tokens: np.ndarray) -> None:
        """Reads one token of each row, int64 [rows]."""

    def select(self, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """Chooses a token of each row by the present logits.

        Args:
            rules: how.
            keys: of the rows' noise, uint32 [rows, 2]; of no effect unless the rules sample.

        Returns:
            Ids, int64 [rows], or `NOT_A_NUMBER` or `NOTHING_LEFT`.
        """
        ...

    def advance(self, tokens: np.ndarray, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """`feed` and `select`, `keys.shape[1]` times, each time with the token that was selected before.

        Args:
            tokens: what to feed first, int64 [rows].
            rules: how to select, the same for all steps.
            keys: uint32 [rows, steps, 2]; 1 to `BLOCK` steps.

        Returns:
            Ids, int64 [rows, steps]; see `select`.
        """
        ...

    def candidates(
        self, rules: Rules, totals: np.ndarray, keys: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best continuations of groups of rows, for a beam search.

        Args:
            rules: how to score; they are normalized. If they sample, `count` are drawn without replacement, by noise
                that is added to the totals, with the group's key and the index below.
            totals: what to add to the scores of each row, float32 [groups, beams]; rows of a group are neighbours.
            keys: uint32 [groups, 2].
            count: how many to return for each group.

        Returns:
            Totals with the scores of the new tokens, without noise, float32 [groups, count], best (or drawn) first; and
            beam * vocab_size + id of each, int64 [groups, count].
        """
        ...

    def scores(self, rules: Rules) -> Any:
        """What `select` chooses from, before noise: the framework's tensor, float32 [rows, vocab_size]."""

    def recorded(self) -> Any:
        """The present logits, for the user: the framework's tensor, which nothing that follows changes."""

    def ids(self, texts: np.ndarray) -> Any:
        """Tokens int64 [rows, length] as the user's functions get them: the framework's tensor."""

    def cache(self, places: np.ndarray, mask: np.ndarray) -> Any:
        """The cache of some positions, for the user; None if positions are not counted as below.

        Args:
            places: positions of each row, int64 [rows, length]: those of the prefill's mask, then one for each token
                that was fed.
            mask: which of them hold a token that the user knows, bool [rows, length].
        """

    def process(self, processors: Sequence[Processor], texts: np.ndarray) -> None:
        """Replaces the logits by what a user's hooks make of a copy of them.

        Args:
            processors: the hooks, in order.
            texts: the tokens so far, int64 [rows, length]; each row ends at the right.

        Raises:
            InputError: see `check_processed`.
        """


def is_overridden(model: object, base: type, name: str = "prepare_inputs_for_generation") -> bool:
    """Whether a model's method is not that of `base`: a subclass has its own, or it was replaced in the object."""
    return getattr(getattr(model, name), "__func__", None) is not getattr(base, name)


def check_not_overridden(model: object, base: type, *names: str) -> None:
    """Raises `InputError` if a method is not that of `base`, where compiled generation never asks it."""
    for name in names:
        if is_overridden(model, base, name):
            raise InputError(
                f"{name} of this {type(model).__name__} is not that of {base.__name__}, and compiled generation never "
                "calls it; write the loop with calls of the model, or generate in PyTorch, which asks the method"
            )


def check_processed(result: Any, shape: tuple[int, ...], place: int) -> None:
    """Raises `InputError` unless what a hook returned has the shape of the logits; `place` is its index."""
    found = getattr(result, "shape", None)
    if found is None or tuple(found) != shape:
        raise InputError(
            f"logits_processor[{place}] returned {type(result).__name__ if found is None else list(found)}, expected "
            f"the logits {list(shape)}; return them from the function, also if it changes them in place"
        )


def no_token(code: int, row: int, step: int) -> InputError:
    """The error for what an engine gives in place of a row's next token."""
    if code == NOT_A_NUMBER:
        return InputError(
            f"the logits of row {row} are not numbers at new token {step}; check the weights and inputs_embeds for "
            "NaN, and use bfloat16 or float32 if float16 overflows"
        )
    return InputError(
        f"of row {row} no token is left at new token {step}: all are banned; loosen suppress_tokens, bad_words_ids, "
        "no_repeat_ngram_size, prefix_allowed_tokens_fn, or the logits_processor"
    )
