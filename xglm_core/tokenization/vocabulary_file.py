"""Reads a vocabulary from either of its files: SentencePiece's model or `tokenizer.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from xglm_core.errors import CheckpointError
from xglm_core.files import POINTER, POINTER_REASON
from xglm_core.tokenization.added_tokens import AddedToken
from xglm_core.tokenization.model_file import in_order_of_ids, in_published_order
from xglm_core.tokenization.tokenizer_json import read_tokenizer_json


@dataclass(frozen=True)
class VocabularyFile:
    """The vocabulary in a file.

    Attributes:
        path: the file.
        model: a SentencePiece model, in the order of the ids.
        added: added tokens by id.
        published: the unchanged SentencePiece file, if that was read.
    """

    path: str
    model: bytes
    added: dict[int, AddedToken]
    published: bytes | None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> VocabularyFile:
        """Reads either file.

        Raises:
            CheckpointError: the file cannot be read, or has another format.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror or error}; expected a SentencePiece model or tokenizer.json"
            ) from None
        if content.startswith(POINTER):
            raise CheckpointError(f"{path}: {POINTER_REASON}")
        # A SentencePiece model never begins with a brace.
        if content[:1] == b"{":
            try:
                model, added = read_tokenizer_json(content)
            except ValueError as error:
                raise CheckpointError(f"{path}: expected tokenizer.json of an XGLM tokenizer, but {error}") from None
            return cls(str(path), model, added, None)
        try:
            return cls(str(path), in_order_of_ids(content), {}, content)
        except ValueError as error:
            raise CheckpointError(f"{path}: expected a SentencePiece model, but {error}") from None

    def sentencepiece_model(self, size: int) -> bytes:
        """Makes SentencePiece's file for a model of `size` pieces.

        Raises:
            CheckpointError: the special tokens are not where readers of that file expect them.
        """
        if self.published is not None:
            return self.published
        try:
            return in_published_order(self.model, size)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
