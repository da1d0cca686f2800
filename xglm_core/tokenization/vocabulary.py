"""The vocabulary: from text to ids and tokens, with the SentencePiece library."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from xglm_core.errors import InputError, InputTypeError
from xglm_core.tokenization.added_tokens import AddedToken, TokenFinder
from xglm_core.tokenization.model_file import FIRST_TOKENS, MADEUP_WORDS

_OPTIONS = ("enable_sampling", "nbest_size", "alpha", "num_threads")

# For fewer texts, the threads of SentencePiece's batches cost more than they save.
_FEW_TEXTS = 64

Offsets = list[tuple[int, int]]


class Vocabulary:
    """Tokens and their ids.

    Args:
        model: a SentencePiece model, in the order of the ids.
        added: further tokens, by id; special ones may be part of the model.
        options: arguments of `SentencePieceProcessor`.

    Attributes:
        model: the model.
        processor: the SentencePiece processor of the model; its ids are ours.
        base_size: the number of tokens of the model.
        tokens: all tokens, by id.
        samples: whether subword sampling is on, so that a text may be split differently each time.
        byte_tokens: the tokens that stand for a byte of an unknown character.
        found: the special and added tokens, by id, which are matched before SentencePiece sees a text.
        added: those of them that follow the tokens of the model, by id.
        special_ids: the id of each special token.

    Raises:
        ValueError: `model` is not a SentencePiece model, or the ids of `added` do not fit it.
        InputError: an option is unknown, or has an impossible value.
    """

    def __init__(self, model: bytes, added: dict[int, AddedToken], options: dict[str, Any]) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise InputError(f"sp_model_kwargs has {name!r}, expected {', '.join(_OPTIONS)}")
        self.model = model
        self._options = options
        self.samples = bool(options.get("enable_sampling"))
        try:
            self.processor = SentencePieceProcessor(**options)
            self.processor.load_from_serialized_proto(model)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(" ".join(str(error).split())) from None
        try:
            self.processor.encode("a")
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"sp_model_kwargs is {options}, which fails: {' '.join(str(error).split())}") from None
        numbers = list(range(len(self.processor)))
        self.base_size = len(numbers)
        self.tokens: list[str] = self.processor.id_to_piece(numbers)
        self.unknown_id: int = self.processor.unk_id()
        are_bytes = zip(self.tokens, self.processor.is_byte(numbers), strict=True)
        self.byte_tokens = frozenset(token for token, is_byte in are_bytes if is_byte)
        self.added: dict[int, AddedToken] = {}
        self._added_ids: dict[str, int] = {}
        self.found = {
            number: AddedToken(self.tokens[number], special=True)
            for number, control in enumerate(self.processor.is_control(numbers))
            if control or number == self.unknown_id
        }
        for number, token in sorted(added.items()):
            if number > len(self.tokens):
                raise ValueError(f"the added token {token.content!r} has id {number}, expected {len(self.tokens)}")
            if number < self.base_size and self.tokens[number] != token.content:
                raise ValueError(
                    f"the added token {token.content!r} has id {number}, but that is {self.tokens[number]!r}"
                )
            if token.special or number >= self.base_size:  # SentencePiece finds user-defined pieces itself.
                self._put(number, token)
        self._update()

    # SentencePiece's own pickling would lose the options.
    def __reduce__(self) -> Any:
        return Vocabulary, (self.model, self.found, self._options)

    def add(self, tokens: Iterable[AddedToken]) -> int:
        """Adds tokens after the last one. A known token only becomes special, with its flags, if it is marked so.

        Returns:
            The number of new tokens.
        """
        size = len(self.tokens)
        for token in tokens:
            self._check(token.content)
            number = self.id_of(token.content)
            if self.tokens[number] != token.content:
                self._put(len(self.tokens), token)
            elif token.special:
                self._put(number, token)
        self._update()
        return len(self.tokens) - size

    def encode(self, text: str, line_break: int | None = None, split_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            text: any text.
            line_break: the id for a run of line breaks; None means that SentencePiece turns them into spaces.
            split_special: whether special tokens in a text are treated as ordinary text.

        Raises:
            InputError: `text` is not a string, or has no UTF-8 encoding.
        """
        if not isinstance(text, str):
            self._check(text)
        try:
            finder = self._finders[split_special]
            if not finder.may_find(text, line_breaks=line_break is not None):
                ids: list[int] = self.processor.encode(text)
                return ids
            ids = []
            for start, stop, number in finder.split(text, line_break):
                ids += self.processor.encode(text[start:stop]) if number is None else [number]
            return ids
        except (TypeError, RuntimeError):
            self._check(text)
            raise

    def encode_batch(
        self, texts: Sequence[str], line_break: int | None = None, split_special: bool = False
    ) -> list[list[int]]:
        """The ids of several texts; see `encode` for arguments and errors."""
        try:
            finder, breaks = self._finders[split_special], line_break is not None
            if len(texts) >= _FEW_TEXTS and not finder.may_find("".join(texts), line_breaks=breaks):
                rows: list[list[int]] = self.processor.encode(list(texts))
                return rows
        except (TypeError, RuntimeError):
            pass  # One of them is not a text; the loop finds it.
        return [self.encode(text, line_break, split_special) for text in texts]

    def encode_with_offsets(
        self, text: str, line_break: int | None = None, split_special: bool = False
    ) -> tuple[list[int], Offsets]:
        """The ids of a text, and begin and end of each token in it [characters]; see `encode`."""
        self._check(text)
        ids: list[int] = []
        offsets: Offsets = []
        for start, stop, number in self._finders[split_special].split(text, line_break):
            if number is None:
                part_ids, part_offsets = self._locate(text[start:stop])
                ids += part_ids
                offsets += [(start + begin, start + end) for begin, end in part_offsets]
            else:
                ids.append(number)
                offsets.append((start, stop))
        return ids, offsets

    def tokenize(self, text: str, line_break: int | None = None, split_special: bool = False) -> list[str]:
        """The tokens of a text; unknown tokens appear as the characters of the text.

        Raises:
            InputError: see `encode`.
        """
        self._check(text)
        tokens: list[str] = []
        for start, stop, number in self._finders[split_special].split(text, line_break):
            tokens += self.processor.encode(text[start:stop], out_type=str) if number is None else [self.tokens[number]]
        return tokens

    def id_of(self, token: str) -> int:
        """The id of a token; that of `<unk>` for an unknown token.

        Raises:
            InputError: `token` is not a string, or has no UTF-8 encoding.
        """
        number = self._added_ids.get(token) if isinstance(token, str) else None
        if number is None:
            self._check(token)
            number = int(self.processor.piece_to_id(token))
        return number

    def _put(self, number: int, token: AddedToken) -> None:
        self.found[number] = token
        if number >= self.base_size:
            self.added[number] = token
            self._added_ids[token.content] = number
        if number == len(self.tokens):
            self.tokens.append(token.content)

    def _update(self) -> None:
        tokens = [(token, number) for number, token in self.found.items()]
        # The key says whether special tokens are split.
        self._finders = TokenFinder(tokens), TokenFinder(pair for pair in tokens if not pair[0].special)
        self.special_ids = {token.content: number for number, token in sorted(self.found.items()) if token.special}

    def _locate(self, text: str) -> tuple[list[int], Offsets]:
        """The ids and offsets of a text without added tokens."""
        pieces = self.processor.encode(text, out_type=str)
        # With sampling, a second call would split the text differently.
        ids = self.processor.piece_to_id(pieces) if self.samples else self.processor.encode(text)
        normalized, begins = self.processor.normalize(text, with_offsets=True)
        ends = begins[1:]
        for place in range(len(ends) - 2, -1, -1):
            # If one character becomes several, as "ﬁ" becomes "fi", all of them end where it ends.
            if ends[place] == begins[place]:
                ends[place] = ends[place + 1]
        offsets: Offsets = []
        place = bytes_left = 0
        for piece, number in zip(pieces, ids, strict=True):
            if self.processor.is_byte(number):
                bytes_left = (bytes_left or len(normalized[place].encode())) - 1
                offsets.append((begins[place], ends[place]))
                place += not bytes_left
            else:
                offsets.append((begins[place], ends[place + len(piece) - 1]))
                place += len(piece)
        return ids, offsets

    @staticmethod
    def _check(text: Any) -> None:
        """Refuses what SentencePiece cannot read, with our own message."""
        if not isinstance(text, str):
            raise InputTypeError(f"a text is {text!r:.80} ({type(text).__name__}), expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"a text has the lone surrogate {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
                "encode; was it decoded with errors='surrogateescape'?"
            ) from None


def trained_model(texts: Iterable[str], vocab_size: int, options: dict[str, Any]) -> bytes:
    """Trains a SentencePiece unigram model like XGLM's: with NFKC, and an id for each character of the texts.

    Args:
        texts: the texts for training.
        vocab_size: the largest number of ids, including special ones.
        options: other arguments of `SentencePieceTrainer`.

    Raises:
        InputError: SentencePiece cannot make such a model.
    """
    model = io.BytesIO()
    usual = {"character_coverage": 1.0, "normalization_rule_name": "nmt_nfkc", "hard_vocab_limit": False}
    pieces = vocab_size - len(MADEUP_WORDS) - len(FIRST_TOKENS) + 3  # A model includes three special pieces.
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=pieces,
            **{"minloglevel": 2, **usual, **options},
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"no vocabulary of {vocab_size} can be made: {' '.join(str(error).split())}") from None
    return model.getvalue()
