"""`XGLMTokenizerFast`: the tokenizer of `tokenizer.json`, the file of the `tokenizers` library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xglm_core.errors import InputError
from xglm_core.tokenization.base import TOKENIZER_FILE, VOCAB_FILE, Tokenizer
from xglm_core.tokenization.sentencepiece import XGLMTokenizer
from xglm_core.tokenization.vocabulary_file import VocabularyFile

if TYPE_CHECKING:
    import tokenizers


class XGLMTokenizerFast(Tokenizer):
    """The ids, tokens and texts of `XGLMTokenizer`, from and to `tokenizer.json`.

    SentencePiece tokenizes the texts here, too. The `tokenizers` library adds scores in float64, but SentencePiece in
    float32; so it may split "cececece" differently, depending on what precedes it. Its normalizer does not compose
    Korean and Vietnamese in NFD. And it is several times slower (`xglm bench tokenize`). Those who want its ids can use
    `backend_tokenizer`.

    Args:
        vocab_file: the SentencePiece model; not needed with `tokenizer_file`.
        tokenizer_file: `tokenizer.json`, which takes precedence.
        bos_token, eos_token, sep_token, cls_token, unk_token, pad_token, kwargs: see `XGLMTokenizer`.

    Raises:
        CheckpointError: the file cannot be read, or has another format.
        InputError: there is no file, or an argument is invalid.
    """

    is_fast = True
    slow_tokenizer_class = XGLMTokenizer
    _vocabulary_names = (TOKENIZER_FILE, VOCAB_FILE)

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        sep_token: Any = "</s>",
        cls_token: Any = "<s>",
        unk_token: Any = "<unk>",
        pad_token: Any = "<pad>",
        **kwargs: Any,
    ) -> None:
        path = tokenizer_file or vocab_file
        if path is None:
            raise InputError("XGLMTokenizerFast needs vocab_file or tokenizer_file, but both are None")
        roles = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "sep_token": sep_token,
            "cls_token": cls_token,
            "unk_token": unk_token,
            "pad_token": pad_token,
        }
        super().__init__(VocabularyFile.read(path), roles, {}, **kwargs)
        self.vocab_file = None if vocab_file is None else str(vocab_file)

    @classmethod
    def _files_of(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        published, other = Path(folder) / VOCAB_FILE, Path(folder) / TOKENIZER_FILE
        if published.exists() and not other.exists():
            return {"vocab_file": published, "tokenizer_file": None}
        return {"vocab_file": published if published.exists() else None, "tokenizer_file": other}

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """A new tokenizer of the `tokenizers` library with this vocabulary, like the published file.

        Its ids differ from ours where its normaliser or its arithmetic differs from SentencePiece's.

        Raises:
            CheckpointError: that form cannot express the vocabulary.
        """
        from tokenizers import Tokenizer as TheirTokenizer

        return TheirTokenizer.from_str(self._tokenizer_json().decode())
