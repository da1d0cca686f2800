"""A SentencePiece model with fairseq's ids.

Special tokens come first, and SentencePiece's pieces follow one place further than in the SentencePiece model itself,
which begins with `<unk>`, `<s>`, `</s>`:

    id               0    1      2     3      4 ... len(pieces)        len(pieces) + 1 ... len(pieces) + 7
    token            <s>  <pad>  </s>  <unk>  piece 3 ... last piece   <madeupword0> ... <madeupword6>

The madeupwords made the size of the published vocabulary a multiple of 8; no text contains them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sentencepiece import SentencePieceProcessor

from xglm_core.errors import CheckpointError, InputError

_FIRST_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
_UNKNOWN = _FIRST_IDS["<unk>"]
_OFFSET = 1  # From a piece's number in SentencePiece to its id.
_MADEUP_WORDS = 7


class Vocabulary:
    """Tokens and their ids.

    Args:
        model: the bytes of a SentencePiece model.
        source: where they come from, for messages.
        options: arguments of `SentencePieceProcessor`.

    Attributes:
        model: as given.
        processor: the SentencePiece processor.
        size: number of ids, special ones included.
        special_ids: id of each special token; these are found in a text before SentencePiece sees it.
        special_tokens: the inverse.

    Raises:
        CheckpointError: `model` is no SentencePiece model, or does not begin with `<unk>`, `<s>`, `</s>`.
    """

    def __init__(self, model: bytes, source: str, options: dict[str, Any]) -> None:
        self.model = model
        self._source = source
        self._options = options
        try:
            self.processor = SentencePieceProcessor(**options)
            self.processor.load_from_serialized_proto(model)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{source}: expected a SentencePiece model, but it cannot be loaded: {reason}"
            ) from None
        pieces = len(self.processor)
        first = [self.processor.id_to_piece(i) for i in range(min(3, pieces))]
        if first != ["<unk>", "<s>", "</s>"]:
            raise CheckpointError(
                f"{source}: the pieces begin with {first}, expected <unk>, <s>, </s>, as fairseq's ids do"
            )
        self.size = pieces + _OFFSET + _MADEUP_WORDS
        madeup_words = {f"<madeupword{i}>": pieces + _OFFSET + i for i in range(_MADEUP_WORDS)}
        self.special_ids = _FIRST_IDS | madeup_words
        self.special_tokens = {number: token for token, number in self.special_ids.items()}
        # The group keeps the special tokens in the result of the split.
        self._split = re.compile(f"({'|'.join(map(re.escape, self.special_ids))})").split

    # SentencePiece's own pickling would forget the options.
    def __reduce__(self) -> Any:
        return Vocabulary, (self.model, self._source, self._options)

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            InputError: `text` is no string, or has no UTF-8 encoding.
        """
        ids: list[int] = []
        for part in self._parts(text):
            special = self.special_ids.get(part)
            ids += map(self._piece_id, self.processor.encode(part)) if special is None else [special]
        return ids

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text; one that is not in the vocabulary appears as the text's own characters.

        Raises:
            InputError: see `encode`.
        """
        tokens: list[str] = []
        for part in self._parts(text):
            tokens += [part] if part in self.special_ids else self.processor.encode(part, out_type=str)
        return tokens

    def id_of(self, token: str) -> int:
        """The id of a token; that of `<unk>` for one that is not in the vocabulary."""
        special = self.special_ids.get(token)
        return self._piece_id(self.processor.piece_to_id(token)) if special is None else special

    def token_of(self, number: int) -> str:
        """The token of an id, which must be in the vocabulary."""
        special = self.special_tokens.get(number)
        return self.processor.id_to_piece(number - _OFFSET) if special is None else special

    def _parts(self, text: str) -> Iterator[str]:
        """Special tokens, and the stretches of text between them."""
        if not isinstance(text, str):
            raise InputError(f"a text is {text!r:.80} ({type(text).__name__}), expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"a text has the lone surrogate {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
                "encode; was it decoded with errors='surrogateescape'?"
            ) from None
        return filter(None, self._split(text))

    @staticmethod
    def _piece_id(piece: int) -> int:
        # SentencePiece numbers the unknown piece 0.
        return piece + _OFFSET if piece else _UNKNOWN
