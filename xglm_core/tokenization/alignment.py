"""Maps the tokens of a row to characters, words and texts, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


class CharSpan(NamedTuple):
    """Begin and end [characters]."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Begin and end [tokens]."""

    start: int
    end: int


@dataclass(frozen=True)
class Encoding:
    """The tokens of one row of a batch.

    Attributes:
        ids, tokens, attention_mask: as in the batch.
        offsets: begin and end of each token [characters] in its text or word; (0, 0) for added tokens and padding.
        word_ids: the index of each token's word in its text; None for added tokens and padding.
        sequence_ids: the index of each token's text in a pair, 0 or 1; None for added tokens and padding.
    """

    ids: list[int]
    tokens: list[str]
    attention_mask: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    sequence_ids: list[int | None]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def words(self) -> list[int | None]:
        """`word_ids`."""
        return self.word_ids

    @property
    def special_tokens_mask(self) -> list[int]:
        """1 for added tokens and padding."""
        return [int(sequence is None) for sequence in self.sequence_ids]

    @property
    def type_ids(self) -> list[int]:
        """Zeros."""
        return [0] * len(self.ids)

    @property
    def n_sequences(self) -> int:
        """The number of texts, 1 or 2."""
        return 2 if 1 in self.sequence_ids else 1

    def token_to_sequence(self, token: int) -> int | None:
        """The text that a token belongs to."""
        return self.sequence_ids[token]

    def token_to_word(self, token: int) -> int | None:
        """The word that a token belongs to."""
        return self.word_ids[token]

    def token_to_chars(self, token: int) -> CharSpan | None:
        """The characters that a token stands for."""
        return None if self.sequence_ids[token] is None else CharSpan(*self.offsets[token])

    def char_to_token(self, char: int, sequence: int = 0) -> int | None:
        """The first token that stands for a character of a text; None if there is none."""
        places = range(len(self.ids))
        return next((i for i in places if self.sequence_ids[i] == sequence and self._has(i, char)), None)

    def word_to_tokens(self, word: int, sequence: int = 0) -> TokenSpan | None:
        """The tokens of a word of a text; None if there are none."""
        places = self._of_word(word, sequence)
        return TokenSpan(places[0], places[-1] + 1) if places else None

    def word_to_chars(self, word: int, sequence: int = 0) -> CharSpan | None:
        """The characters of a word of a text; None if it has no tokens."""
        places = self._of_word(word, sequence)
        return CharSpan(self.offsets[places[0]][0], self.offsets[places[-1]][1]) if places else None

    def char_to_word(self, char: int, sequence: int = 0) -> int | None:
        """The word that a character of a text belongs to; None if it has no token."""
        token = self.char_to_token(char, sequence)
        return None if token is None else self.word_ids[token]

    def _has(self, token: int, char: int) -> bool:
        start, stop = self.offsets[token]
        return start <= char < stop

    def _of_word(self, word: int, sequence: int) -> list[int]:
        pairs = enumerate(zip(self.word_ids, self.sequence_ids, strict=True))
        return [place for place, pair in pairs if pair == (word, sequence)]


def words_of(tokens: Iterable[str], are_added: Iterable[bool]) -> list[int]:
    """The index of each token's word: "▁" begins a word, and an added token is a word."""
    numbers: list[int] = []
    number, ended = -1, True
    for token, is_added in zip(tokens, are_added, strict=True):
        number += bool(ended or is_added or token.startswith("▁"))
        ended = is_added
        numbers.append(number)
    return numbers


def encodings_of(columns: dict[str, list[list[Any]]], tokens: list[str]) -> list[Encoding]:
    """Makes an `Encoding` of each row of complete columns."""
    names = ("attention_mask", "offset_mapping", "word_ids", "sequence_ids")
    rows = zip(columns["input_ids"], *(columns[name] for name in names), strict=True)
    return [Encoding(ids, [tokens[number] for number in ids], *others) for ids, *others in rows]
