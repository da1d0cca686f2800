"""Calls of `generate` whose texts transformers gives too, token for token.

Each is there for one reason. The prompts are padded on the left, which must not matter; two models tell luck from rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.config import XGLMConfig

# Untied: with a tied head a random model repeats itself.
CONFIG = XGLMConfig(vocab_size=131, d_model=35, attention_heads=5, ffn_dim=53, num_layers=3, tie_word_embeddings=False)
SEEDS = (51, 52)

_MASK = np.array([[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]], np.int64)


def prompts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int64 [4, 7]."""
    ids = np.random.RandomState(seed).randint(3, CONFIG.vocab_size, _MASK.shape, dtype=np.int64)
    ids[_MASK == 0] = 1  # The padding id.
    return ids, _MASK


@dataclass(frozen=True)
class GenerateCase:
    """A call of `generate`.

    Attributes:
        name: identifies the case.
        options: of `generate`, by the names that both sides have.
        why: what this case alone can show.
    """

    name: str
    options: Mapping[str, Any]
    why: str

    @property
    def alone(self) -> bool:
        """Whether transformers has to be given each row by itself, as it would count padding as part of the text."""
        return bool({"repetition_penalty", "no_repeat_ngram_size"} & self.options.keys())


def _case(name: str, why: str, **options: Any) -> GenerateCase:
    return GenerateCase(name, {"max_new_tokens": 23, "do_sample": False, **options}, why)


# Ends that random models reach: each of some ids follows now and then.
_ENDS = [2, *range(10, 131, 17)]

GENERATE_CASES = (
    _case("greedy", "the likeliest token"),
    _case("ends", "rows that end early, by several ids", eos_token_id=_ENDS),
    _case("min_new_tokens", "no end before that", eos_token_id=_ENDS, min_new_tokens=9),
    _case("max_length", "counts the prompt and its padding", max_new_tokens=None, max_length=19),
    _case("repetition_penalty", "positive and negative scores", repetition_penalty=1.7),
    _case("repetition_reward", "below 1", repetition_penalty=0.8),
    _case("no_repeat_ngram", "over prompt and new text", no_repeat_ngram_size=2),
    _case(
        "bad_words", "single ids and sequences", bad_words_ids=[[7], [30], [88, 12], *([i, i] for i in range(3, 131))]
    ),
    _case("suppress_tokens", "ids that never come", suppress_tokens=list(range(40, 110))),
    _case("penalties", "all of them", repetition_penalty=1.3, no_repeat_ngram_size=3, suppress_tokens=[5, 6, 7]),
    _case("beams", "the default heuristic for the end", num_beams=4, eos_token_id=_ENDS),
    _case("beams_without_end", "no beam ends before the limit", num_beams=3),
    _case("early", "ends with the first beams that end", num_beams=3, eos_token_id=_ENDS, early_stopping=True),
    _case("never", "ends when nothing can be better", num_beams=3, eos_token_id=_ENDS, early_stopping="never"),
    _case("long", "a bonus for length", num_beams=4, eos_token_id=_ENDS, length_penalty=2.0),
    _case(
        "long_never",
        "and the longest in sight",
        num_beams=3,
        eos_token_id=_ENDS,
        length_penalty=0.7,
        early_stopping="never",
    ),
    _case("short", "a penalty for length", num_beams=4, eos_token_id=_ENDS, length_penalty=-0.5),
    _case("sequences", "several of each prompt", num_beams=5, num_return_sequences=3, eos_token_id=_ENDS),
    _case(
        "beams_with_penalties",
        "penalties act on log-probabilities",
        num_beams=4,
        eos_token_id=_ENDS,
        repetition_penalty=1.4,
        no_repeat_ngram_size=2,
        min_new_tokens=4,
    ),
)
