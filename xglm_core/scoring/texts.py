"""Scores texts, and continuations after their contexts, with any backend's model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.inputs import check_input_ids
from xglm_core.scoring.windows import Window, batches, padded, windows
from xglm_core.scoring.words import Word, words

if TYPE_CHECKING:
    from xglm_core.tokenization.base import Tokenizer

BATCH_TOKENS = 2048

Item = str | tuple[str, str]


class Scorer(Protocol):
    """A causal language model of any backend.

    Attributes:
        config: the model's configuration.
    """

    config: XGLMConfig

    def score(self, input_ids: Any, attention_mask: Any) -> Any:
        """Log-probabilities [rows, length - 1] of int64 arrays [rows, length]; `np.asarray` can read them."""
        ...


@dataclass(frozen=True)
class TextScore:
    """How likely a text is, or a continuation after its context.

    Attributes:
        text: the text; for a pair, context and continuation joined.
        tokens: the tokens that are scored: those of the text, or of the continuation. The `</s>` before every text is
            not scored, as nothing precedes it.
        ids: the id of each of these tokens.
        offsets: where each token begins and ends in `text` [characters], including the space before it.
        log_probabilities: the log-probability of each token, given all before it [nats].
        words: the surprisal of words [bits].
    """

    text: str
    tokens: list[str]
    ids: list[int]
    offsets: list[tuple[int, int]]
    log_probabilities: list[float]
    words: list[Word]

    @property
    def sum(self) -> float:
        """The log-probability of all scored tokens together [nats]."""
        return math.fsum(self.log_probabilities)

    @property
    def count(self) -> int:
        """The number of scored tokens."""
        return len(self.ids)

    @property
    def perplexity(self) -> float:
        """exp(-sum / count), per token of this tokenizer, including `</s>` at line breaks."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.sum / self.count))


@dataclass(frozen=True)
class EncodedText:
    """A text as the model will read it after `</s>`.

    Attributes:
        text, ids, offsets: see `TextScore`, but for all tokens.
        first: the index of the first token that is scored.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    first: int


def score_texts(
    model: Scorer,
    tokenizer: Tokenizer,
    texts: Sequence[Item],
    *,
    stride: int | None = None,
    newline: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[TextScore]:
    """Scores texts, or continuations after their contexts.

    A pair is joined as it stands, without a space in between, and the whole is tokenized. The tokens of the
    continuation are those that reach into it, or into the white space before it. So "The dog" + " runs" and "The dog "
    + "runs" score the same token. A token that crosses the boundary inside a word counts as well. A line break that is
    `</s>` belongs to the side on which it was written.

    A text that is longer than the model's context is read in windows that move by `stride` tokens. Each token is scored
    once: in the first window given all that precedes it, in the others given at least
    `max_position_embeddings - stride` tokens.

    Args:
        model: the causal language model of any backend.
        tokenizer: its tokenizer.
        texts: strings, or pairs (context, continuation) of strings, or some of each; a context may be empty.
        stride: how far the window moves [tokens], 1 to `max_position_embeddings` - 1; None means half of the context.
        newline: "space" or "eos"; None follows the tokenizer.
        batch_tokens: the largest number of tokens in a batch, including padding; a single long text may exceed it.

    Returns:
        A score for each text, in order.

    Raises:
        InputError: there are no texts; one of them is neither a string nor a pair, has no tokens to score, or has
            tokens that the model does not know; or `stride`, `newline` or `batch_tokens` is out of range.
    """
    if not isinstance(texts, list | tuple) or not texts:
        raise InputError(f"texts is {texts!r:.80}, expected a list of strings or pairs of strings, not empty")
    stride = checked_stride(model.config, stride)
    if not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens!r}, expected a number of tokens, 1 or more")
    encoded = [encode(model.config, tokenizer, text, newline, f"texts[{i}]") for i, text in enumerate(texts)]
    return score_encoded(model, tokenizer, encoded, stride, batch_tokens)


def checked_stride(config: XGLMConfig, stride: int | None) -> int:
    """The stride, or half of the context for None; raises `InputError` if it is out of range."""
    limit = config.max_position_embeddings
    stride = limit // 2 if stride is None else stride
    if not isinstance(stride, int) or not 1 <= stride < limit:
        raise InputError(f"stride is {stride!r}, expected 1 to {limit - 1} (max_position_embeddings={limit})")
    return stride


def encode(config: XGLMConfig, tokenizer: Tokenizer, item: Item, newline: str | None, where: str) -> EncodedText:
    """Tokenizes a text or a pair.

    Args:
        config: the model's configuration.
        tokenizer: its tokenizer.
        item: a text, or a context and its continuation.
        newline: "space" or "eos"; None follows the tokenizer.
        where: the name of the text in errors.

    Raises:
        InputError: see `score_texts`.
    """
    parts = item if isinstance(item, list | tuple) else (item,)
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise InputError(f"{where} is {item!r:.80}, expected a string, or a pair (context, continuation) of strings")
    name = "continuation" if len(parts) == 2 else "text"
    if not parts[-1]:
        raise InputError(f"{where}: the {name} is empty, expected at least one token")
    text, context = "".join(parts), "".join(parts[:-1])
    try:
        row = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, newline=newline, verbose=False)
        check_input_ids(np.asarray([row.input_ids or [0]]), config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    ids, offsets, boundary = row.input_ids, row.offset_mapping, len(context.rstrip())
    counts = [
        end > len(context) or (end > boundary and number != tokenizer.eos_token_id)
        for number, (_, end) in zip(ids, offsets, strict=True)
    ]
    if not any(counts):
        raise InputError(f"{where}: the {name} {parts[-1]!r:.80} has no tokens, expected at least one")
    return EncodedText(text, ids, offsets, counts.index(True))


def score_encoded(
    model: Scorer, tokenizer: Tokenizer, texts: Sequence[EncodedText], stride: int, batch_tokens: int
) -> list[TextScore]:
    """`score_texts` for the results of `encode`."""
    begin = tokenizer.sep_token_id
    if begin is None:
        raise InputError("the first token is scored given sep_token (</s>), but the tokenizer has none; set it")
    special = {*tokenizer.all_special_tokens} - {tokenizer.unk_token}  # An unknown character is part of its word.
    limit = model.config.max_position_embeddings
    sequences = [np.array([begin, *text.ids], np.int64) for text in texts]
    parts = [
        window
        for number, text in enumerate(texts)
        for window in windows(number, len(sequences[number]), text.first + 1, limit, stride)
    ]
    scores = [np.zeros(len(sequence)) for sequence in sequences]
    for batch in batches(parts, batch_tokens):
        _score_batch(model, sequences, batch, scores)
    results = []
    for text, row in zip(texts, scores, strict=True):
        ids, offsets, numbers = text.ids[text.first :], text.offsets[text.first :], row[text.first + 1 :].tolist()
        tokens = tokenizer.convert_ids_to_tokens(ids)
        in_words = words(text.text, tokens, offsets, numbers, special)
        results.append(TextScore(text.text, tokens, ids, offsets, numbers, in_words))
    return results


def _score_batch(
    model: Scorer, sequences: Sequence[np.ndarray], batch: Sequence[Window], scores: Sequence[np.ndarray]
) -> None:
    """Scores windows, and writes the scores to the places of their tokens."""
    found = np.asarray(model.score(*padded(sequences, batch)))
    for row, window in enumerate(batch):
        scores[window.sequence][window.first : window.end] = found[row, window.scored]
