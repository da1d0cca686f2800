"""The protocol by which generation uses a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from xglm_core.errors import InputError
from xglm_core.generation.rules import Rules

# How many tokens to compute between two checks for end ids. Rows that have ended waste at most this many steps.
BLOCK = 16

# What `Engine.select` and `Engine.advance` return in place of an id.
NOT_A_NUMBER = -1  # The row's logits contain NaN.
NOTHING_LEFT = -2  # All ids are banned.

# A user's hook: (tokens so far [rows, length], logits [rows, vocab_size]) -> logits; all are tensors of the framework.
Processor = Callable[[Any, Any], Any]


class Engine(Protocol):
    """The state of one call: a cache and the latest logits, both on the device.

    Attributes:
        bucket: prompt lengths and capacities are multiples of this many tokens, so that compiled code is reused; 1 if
            nothing is compiled.
        shows_rows: whether a user's method sees each step of all rows, so that none may leave before the end.
        logits: the logits of the last token of each row, the framework's tensor [rows, vocab_size].
    """

    bucket: int
    shows_rows: bool
    logits: Any

    def prefill(self, tokens: np.ndarray, attention_mask: np.ndarray, capacity: int, seen: np.ndarray | None) -> None:
        """Reads the prompts.

        Args:
            tokens: padded on the left, ids int64 [rows, length] or embeddings float32 [rows, length, d_model].
            attention_mask: 1 for tokens, 0 for padding, of cached and new positions, int64 [rows, past + length].
            capacity: how many positions the cache must hold.
            seen: the ids that each row contains, int32 [rows, any], filled up with `vocab_size`. None without a
                repetition penalty.
        """

    def reorder(self, rows: np.ndarray) -> None:
        """Keeps these rows, int64 [new rows], in this order; a row may occur several times."""

    def feed(self, tokens: np.ndarray) -> None:
        """Reads one token of each row, int64 [rows]."""

    def select(self, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """Chooses a token for each row, by the latest logits.

        Args:
            rules: how to choose.
            keys: the keys of the rows' noise, uint32 [rows, 2]; without effect unless the rules sample.

        Returns:
            Ids, int64 [rows]; `NOT_A_NUMBER` or `NOTHING_LEFT` for a row without a token.
        """
        ...

    def advance(self, tokens: np.ndarray, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """Repeats `feed` and `select` for each step of `keys`, feeding the token that was selected last.

        Args:
            tokens: the tokens to feed first, int64 [rows].
            rules: how to select in all steps.
            keys: uint32 [rows, steps, 2], with 1 to `BLOCK` steps.

        Returns:
            Ids, int64 [rows, steps]; see `select`.
        """
        ...

    def candidates(
        self, rules: Rules, totals: np.ndarray, keys: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the best continuations of each group of rows, for beam search.

        Args:
            rules: how to score; they are normalized. If they sample, `count` continuations are drawn without
                replacement: noise by the group's key and the index below is added to the totals.
            totals: what to add to the scores of each row, float32 [groups, beams]; the rows of a group are neighbours.
            keys: uint32 [groups, 2].
            count: how many continuations to return for each group.

        Returns:
            Totals plus the scores of the new tokens, without noise, float32 [groups, count], in descending order, or in
            the order of drawing; and beam * vocab_size + id, int64 [groups, count].
        """
        ...

    def scores(self, rules: Rules) -> Any:
        """The scores from which `select` chooses, without noise: the framework's tensor, float32 [rows, vocab_size]."""

    def recorded(self) -> Any:
        """The latest logits for the user: a tensor of the framework that never changes."""

    def ids(self, sequences: np.ndarray) -> Any:
        """Token ids int64 [rows, length] as a tensor of the framework, for the user's functions."""

    def cache(self, places: np.ndarray, mask: np.ndarray) -> Any:
        """The cache of some positions, for the user; None if the engine does not number positions as below.

        Args:
            places: positions of each row, int64 [rows, length]: first those of the prefill's mask, then one for each
                token that was fed.
            mask: which of them hold a token of the result, bool [rows, length].
        """

    def process(self, processors: Sequence[Processor], sequences: np.ndarray) -> None:
        """Applies a user's hooks to a copy of the logits, and keeps what they return.

        Args:
            processors: the hooks, in order.
            sequences: the tokens so far, int64 [rows, length], padded on the left.

        Raises:
            InputError: see `processed`.
        """


def is_overridden(model: object, base: type, name: str = "prepare_inputs_for_generation") -> bool:
    """Whether a subclass of `base`, or the model object itself, has replaced a method."""
    return getattr(getattr(model, name), "__func__", None) is not getattr(base, name)


def check_not_overridden(model: object, base: type, *names: str) -> None:
    """Raises `InputError` if methods that compiled generation never calls are overridden."""
    for name in names:
        if is_overridden(model, base, name):
            raise InputError(
                f"{name} of this {type(model).__name__} is not that of {base.__name__}, and compiled generation never "
                "calls it; write the loop with calls of the model, or generate in PyTorch, which asks the method"
            )


def processed(processors: Sequence[Processor], ids: Any, logits: Any) -> Any:
    """What a user's hooks make of the logits.

    Raises:
        InputError: the result of a hook does not have the shape of the logits.
    """
    expected = list(logits.shape)
    for place, processor in enumerate(processors):
        logits = processor(ids, logits)
        found = getattr(logits, "shape", None)
        if found is None or list(found) != expected:
            raise InputError(
                f"logits_processor[{place}] returned {type(logits).__name__ if found is None else list(found)}, "
                f"expected the logits {expected}; return them from the function, also if it changes them in place"
            )
    return logits


def no_token(code: int, row: int, step: int) -> InputError:
    """The error for a code that an engine returned in place of a row's next token."""
    if code == NOT_A_NUMBER:
        return InputError(
            f"the logits of row {row} are not numbers at new token {step}; check the weights and inputs_embeds for "
            "NaN, and use bfloat16 or float32 if float16 overflows"
        )
    return InputError(
        f"row {row} has no token left at new token {step}: all are banned; loosen suppress_tokens, bad_words_ids, "
        "no_repeat_ngram_size, prefix_allowed_tokens_fn, or the logits_processor"
    )
