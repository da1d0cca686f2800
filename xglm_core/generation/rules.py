"""The rules by which a device selects tokens: which are banned, and how to choose among the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.rounding import power_of_two

# A user's function: (number of a prompt, its tokens so far [length]) -> the ids that may follow.
PrefixFunction = Callable[[int, Any], Any]

_MIN_BANNED_WIDTH = 8  # The array of banned ids has a power of two as its width, so that few programs are compiled.


@dataclass(frozen=True)
class Rules:
    """How to turn logits into a choice.

    In this order, as in transformers:

    1. log-softmax, if `normalized`;
    2. `bias` is added, or takes the place of the scores if `forced`;
    3. of ids that the text contains, positive scores are divided by `repetition_penalty`, negative ones multiplied;
    4. banned ids get minus infinity;
    5. if `sample`: division by `temperature`, then only the `top_k` likeliest, of these those that make up `top_p`, of
       these those within `min_p`, of these those that make up `typical_p`;
    6. log-softmax, if `renormalized`;
    7. if `sample`: the Gumbel noise of the row's key is added (see `xglm_core.generation.randomness`).

    Then the largest is chosen.

    Attributes:
        banned: ids, int32 [rows, width], filled up with `vocab_size`.
        bias: float32 [rows or 1, vocab_size], or None.
        forced: whether the bias replaces the model's scores.
        normalized: whether scores become log-probabilities first, as beam search needs.
        renormalized: whether scores become log-probabilities again after the limits.
        repetition_penalty, sample, temperature, top_k, top_p, min_p, typical_p: see `GenerationConfig`; 0 for
            `top_k` or `min_p` means no limit.
        min_tokens_to_keep: how many of the likeliest candidates no limit removes, so that each beam can go on.
    """

    banned: np.ndarray
    bias: np.ndarray | None = None
    forced: bool = False
    normalized: bool = False
    renormalized: bool = False
    repetition_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    min_tokens_to_keep: int = 1

    @property
    def ordered(self) -> bool:
        """Whether the limits need sorted scores; `min_p` alone does not."""
        return (
            bool(self.top_k) or self.top_p < 1 or self.typical_p < 1 or (self.min_p > 0 and self.min_tokens_to_keep > 1)
        )

    @property
    def penalized(self) -> bool:
        """Whether the ids that the text contains are penalized."""
        return self.repetition_penalty != 1


class RuleMaker:
    """Makes the rules of each step.

    Args:
        generation: the options.
        config: the model's configuration.
        columns: the length of the prompts.
        limit: the largest number of new tokens.

    Raises:
        InputError: an id is outside the vocabulary, or nothing is left to generate.
    """

    def __init__(self, generation: GenerationConfig, config: XGLMConfig, columns: int, limit: int) -> None:
        self._generation = generation
        self._vocab_size = config.vocab_size
        words = [tuple(word) for word in generation.bad_words_ids or ()]
        # As in transformers, the end id is not a bad word.
        words = [word for word in words if word not in {(end,) for end in generation.eos_ids}]
        first = () if generation.forced_bos_token_id is None else (generation.forced_bos_token_id,)
        for name, ids in (
            ("eos_token_id", generation.eos_ids),
            ("suppress_tokens", generation.suppress_tokens or ()),
            ("begin_suppress_tokens", generation.begin_suppress_tokens or ()),
            ("bad_words_ids", [token for word in words for token in word]),
            ("sequence_bias", [token for word in generation.biases for token in word]),
            ("forced_bos_token_id", first),
            ("forced_eos_token_id", generation.last_ids),
            ("pad_token_id", [generation.pad_id]),
        ):
            for token in ids:
                if not 0 <= token < config.vocab_size:
                    raise InputError(f"{name} has {token}, expected ids from 0 to {config.vocab_size - 1}")
        # Never generated, whatever the options say: they stand for no token.
        no_tokens = range(config.vocab_size - config.padding_rows, config.vocab_size)
        self._always = {
            *no_tokens,
            *(generation.suppress_tokens or ()),
            *(word[0] for word in words if len(word) == 1),
        }
        self._sequences = [word for word in words if len(word) > 1]
        if len(self._always) >= config.vocab_size:
            raise InputError("suppress_tokens and bad_words_ids hold all ids of the vocabulary, so none can follow")
        self._biased_sequences = [(word, bias) for word, bias in generation.biases.items() if len(word) > 1]
        self._bias = np.zeros((1, config.vocab_size), np.float32) if generation.biases else None
        for word, bias in generation.biases.items():
            if self._bias is not None and len(word) == 1:
                self._bias[0, word[0]] = bias
        self._min_new = generation.least_tokens(columns)
        if self._min_new > limit:
            raise InputError(
                f"min_length is {generation.min_length}, but the text has at most {columns + limit} columns"
            )
        # By the number of new tokens so far: the ids that are forced, and those that are suppressed at the begin.
        self._forced: dict[int, tuple[int, ...]] = {0: first} if first else {}
        if generation.last_ids:
            self._forced[limit - 1] = generation.last_ids
        unwanted = generation.begin_suppress_tokens
        self._at_begin = {len(first): {*unwanted}} if unwanted else {}
        around = [step + more for step in (*self._at_begin, *self._forced) for more in (0, 1)]
        self._changes = {self._min_new, limit, *around}

    @property
    def min_tokens_to_keep(self) -> int:
        """See `Rules`. As in transformers, each beam has one more candidate than there are end ids."""
        count = max(2, 1 + len(self._generation.eos_ids)) if self._generation.num_beams > 1 else 1
        return min(count, self._vocab_size)

    @property
    def depend_on_text(self) -> bool:
        """Whether the rules can change with each token."""
        return bool(self._sequences or self._biased_sequences) or self._generation.no_repeat_ngram_size > 0

    def steps_without_change(self, generated: int) -> int:
        """The number of steps for which the rules stay the same, after `generated` new tokens."""
        return 1 if self.depend_on_text else min(step for step in self._changes if step > generated) - generated

    def rules(
        self, sequences: Sequence[Sequence[int]], generated: int, allowed: Sequence[np.ndarray] | None = None
    ) -> Rules:
        """The rules of a step.

        Args:
            sequences: the tokens of each row so far, including the prompt.
            generated: how many of them are new.
            allowed: the ids that each row may get; None allows all.
        """
        generation, forced = self._generation, self._forced.get(generated)
        bias: np.ndarray | None
        banned: list[list[int]]
        if forced:
            bias, banned = self._only([np.array(forced)]), [[]] * len(sequences)
        else:
            bias, banned = self._bias_after(sequences), self._banned(sequences, generated)
            if allowed is not None:
                only = self._only(allowed)
                bias = only if bias is None else bias + only
        limits = generation if generation.do_sample else GenerationConfig()
        top_k = max(limits.top_k, self.min_tokens_to_keep) if limits.top_k else 0
        return Rules(
            banned=self._padded(banned),
            bias=bias,
            forced=forced is not None,
            normalized=generation.num_beams > 1,
            renormalized=generation.renormalize_logits,
            repetition_penalty=float(generation.repetition_penalty),
            sample=generation.do_sample,
            temperature=float(limits.temperature),
            top_k=top_k if top_k < self._vocab_size else 0,
            top_p=float(limits.top_p),
            min_p=float(limits.min_p or 0),
            typical_p=float(limits.typical_p),
            min_tokens_to_keep=self.min_tokens_to_keep,
        )

    def _banned(self, sequences: Sequence[Sequence[int]], generated: int) -> list[list[int]]:
        common = self._always | self._at_begin.get(generated, set())
        if generated < self._min_new:
            common |= {*self._generation.eos_ids}
        return [sorted(common | {*self._banned_after(sequence)}) for sequence in sequences]

    def _banned_after(self, sequence: Sequence[int]) -> Iterator[int]:
        """The ids that must not follow a sequence."""
        for *begin, last in self._sequences:
            if _ends_with(sequence, begin):
                yield last
        size = self._generation.no_repeat_ngram_size
        if size and len(sequence) >= size:
            end = [*sequence[len(sequence) - size + 1 :]]
            for place in range(len(sequence) - size + 1):
                if [*sequence[place : place + size - 1]] == end:
                    yield sequence[place + size - 1]

    def _bias_after(self, sequences: Sequence[Sequence[int]]) -> np.ndarray | None:
        """The bias that is added to the scores, float32 [rows or 1, vocab_size]."""
        if self._bias is None or not self._biased_sequences:
            return self._bias
        result = np.repeat(self._bias, len(sequences), axis=0)
        for (*begin, last), bias in self._biased_sequences:
            for row, sequence in zip(result, sequences, strict=True):
                if _ends_with(sequence, begin):
                    row[last] += bias
        return result

    def _only(self, allowed: Sequence[np.ndarray]) -> np.ndarray:
        """The bias that allows each row only these ids."""
        result = np.full((len(allowed), self._vocab_size), -np.inf, np.float32)
        for row, ids in zip(result, allowed, strict=True):
            row[ids] = 0
        return result

    def _padded(self, banned: Sequence[Sequence[int]]) -> np.ndarray:
        widest = max(map(len, banned))
        width = max(_MIN_BANNED_WIDTH, power_of_two(widest)) if widest else 0
        result = np.full((len(banned), width), self._vocab_size, np.int32)
        for row, ids in zip(result, banned, strict=True):
            row[: len(ids)] = ids
        return result


def allowed_ids(function: PrefixFunction, ids: Any, prompts: Sequence[int | None], vocab_size: int) -> list[np.ndarray]:
    """The ids that the user's function allows each row.

    Args:
        function: a function of a prompt's number and its tokens so far [length].
        ids: the tokens so far, the framework's tensor [rows, length].
        prompts: the number of each row's prompt; None for a row that has ended.
        vocab_size: the number of ids.

    Raises:
        InputError: the function returns anything but ids of the vocabulary.
    """
    result = []
    for row, prompt in enumerate(prompts):
        found: Any = [0] if prompt is None else function(prompt, ids[row])
        try:
            allowed = np.array(found.tolist() if hasattr(found, "tolist") else list(found), np.int64)
        except (TypeError, ValueError):
            raise InputError(
                f"prefix_allowed_tokens_fn returned a {type(found).__name__} for prompt {prompt}, expected ids"
            ) from None
        if ((allowed < 0) | (allowed >= vocab_size)).any():
            raise InputError(f"prefix_allowed_tokens_fn returned ids for prompt {prompt} beyond 0 to {vocab_size - 1}")
        result.append(allowed)
    return result


def _ends_with(sequence: Sequence[int], end: Sequence[int]) -> bool:
    return len(sequence) >= len(end) and [*sequence[len(sequence) - len(end) :]] == [*end]
