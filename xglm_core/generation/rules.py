"""What the device is told before it selects tokens: which are banned, and how to choose among the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig

_LEAST_WIDTH = 8  # Of the array of banned ids; its width is a power of two, so that few programs are compiled.


@dataclass(frozen=True)
class Rules:
    """How to turn logits into a choice.

    In this order, as in transformers:

    1. log-softmax, if `normalized`;
    2. of ids that the text contains, positive scores are divided by `repetition_penalty`, negative ones multiplied;
    3. banned ids get minus infinity;
    4. if `sample`: division by `temperature`, then only the `top_k` likeliest, of these those that make up `top_p`, of
       these those within `min_p`, of these those that make up `typical_p`; then the Gumbel noise of the row's key is
       added (see `xglm_core.generation.randomness`).

    Then the largest is chosen.

    Attributes:
        banned: ids, int32 [rows, width]; `vocab_size` where there is none.
        normalized: whether scores are log-probabilities, as beams need them.
        repetition_penalty, sample, temperature, top_k, top_p, min_p, typical_p: see `GenerationConfig`; `top_k` and
            `min_p` are 0 for no limit.
        least: candidates that no limit takes away, so that each beam can go on.
    """

    banned: np.ndarray
    normalized: bool = False
    repetition_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    least: int = 1

    @property
    def ordered(self) -> bool:
        """Whether the limits need the scores in their order; `min_p` alone does not."""
        return bool(self.top_k) or self.top_p < 1 or self.typical_p < 1 or (self.min_p > 0 and self.least > 1)

    @property
    def penalized(self) -> bool:
        """Whether it matters which ids the text contains."""
        return self.repetition_penalty != 1


class RuleMaker:
    """Makes the rules of each step.

    Args:
        generation: the options.
        config: the model's configuration.

    Raises:
        InputError: an id is outside the vocabulary, or nothing is left to generate.
    """

    def __init__(self, generation: GenerationConfig, config: XGLMConfig) -> None:
        self._generation = generation
        self._vocab_size = config.vocab_size
        words = [tuple(word) for word in generation.bad_words_ids or ()]
        # As in transformers: the end of the text is no bad word.
        words = [word for word in words if word not in {(number,) for number in generation.eos_ids}]
        for name, numbers in (
            ("eos_token_id", generation.eos_ids),
            ("suppress_tokens", generation.suppress_tokens or ()),
            ("bad_words_ids", [number for word in words for number in word]),
            ("forced_bos_token_id", [number for number in (generation.forced_bos_token_id,) if number is not None]),
            ("pad_token_id", [generation.filler]),
        ):
            for number in numbers:
                if not 0 <= number < config.vocab_size:
                    raise InputError(f"{name} has {number}, expected ids from 0 to {config.vocab_size - 1}")
        self._always = {*(generation.suppress_tokens or ()), *(word[0] for word in words if len(word) == 1)}
        self._sequences = [word for word in words if len(word) > 1]
        if len(self._always) >= config.vocab_size:
            raise InputError("suppress_tokens and bad_words_ids hold all ids of the vocabulary, so none can follow")

    @property
    def depend_on_text(self) -> bool:
        """Whether the rules may change with each token."""
        return bool(self._sequences) or self._generation.no_repeat_ngram_size > 0

    def steps_without_change(self, generated: int) -> int | None:
        """After so many new tokens, the number of steps for which the rules stay the same; None for all."""
        if self.depend_on_text:
            return 1
        left = self._generation.min_new_tokens - generated
        return left if left > 0 else None

    def rules(self, texts: Sequence[Sequence[int]], generated: int) -> Rules:
        """The rules of a step.

        Args:
            texts: the tokens of each row so far, prompt included.
            generated: how many of them are new.
        """
        generation = self._generation
        common = self._always | ({*generation.eos_ids} if generated < generation.min_new_tokens else set())
        banned = [sorted(common | {*self._banned_after(text)}) for text in texts]
        # As in transformers: of each beam one more than may end.
        least = max(2, 1 + len(generation.eos_ids)) if generation.num_beams > 1 else 1
        top_k = max(generation.top_k, least) if generation.top_k else 0
        return Rules(
            banned=self._padded(banned),
            normalized=generation.num_beams > 1,
            repetition_penalty=float(generation.repetition_penalty),
            sample=generation.do_sample,
            temperature=float(generation.temperature),
            top_k=top_k if top_k < self._vocab_size else 0,
            top_p=float(generation.top_p),
            min_p=float(generation.min_p or 0),
            typical_p=float(generation.typical_p),
            least=least,
        )

    def _banned_after(self, text: Sequence[int]) -> Iterator[int]:
        """What may not follow a text."""
        for *begin, last in self._sequences:
            if len(text) >= len(begin) and [*text[len(text) - len(begin) :]] == begin:
                yield last
        size = self._generation.no_repeat_ngram_size
        if size and len(text) >= size:
            end = [*text[len(text) - size + 1 :]]
            for place in range(len(text) - size + 1):
                if [*text[place : place + size - 1]] == end:
                    yield text[place + size - 1]

    def _padded(self, banned: Sequence[Sequence[int]]) -> np.ndarray:
        widest = max(map(len, banned))
        width = max(_LEAST_WIDTH, 1 << (widest - 1).bit_length()) if widest else 0
        result = np.full((len(banned), width), self._vocab_size, np.int32)
        for row, numbers in zip(result, banned, strict=True):
            row[: len(numbers)] = numbers
        return result
