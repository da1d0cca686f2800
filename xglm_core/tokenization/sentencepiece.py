"""`XGLMTokenizer`: from text to token ids and back, with the SentencePiece library."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from xglm_core.tokenization.base import TOKENIZER_FILE, VOCAB_FILE, Tokenizer
from xglm_core.tokenization.model_file import with_dummy_prefix
from xglm_core.tokenization.vocabulary_file import VocabularyFile


class XGLMTokenizer(Tokenizer):
    """Converts text to token ids and back, with the ids of the published vocabulary.

    A text becomes `</s> X`, a pair `</s> A </s></s> B`. In training each text followed the end of another one, so XGLM
    expects `</s>` first; `<s>` was not used. SentencePiece normalizes the text: NFKC; each run of white space or
    newlines becomes one space; spaces at the ends are removed. Special tokens inside a text, such as "</s>", become
    their ids.

    Args:
        vocab_file: the SentencePiece model, or `tokenizer.json`.
        bos_token, eos_token, sep_token, cls_token, unk_token, pad_token: the special token of each role, or None.
            Unknown tokens are added to the vocabulary.
        sp_model_kwargs: arguments of `SentencePieceProcessor`: `enable_sampling`, `nbest_size` and `alpha` for subword
            sampling, and `num_threads` for batches.
        kwargs: the attributes below, `additional_special_tokens`, `added_tokens_decoder`, and other keys of
            `tokenizer_config.json`, which are kept for `save_pretrained`.

    Attributes:
        padding_side: the default side for padding: "right" as published, or "left".
        truncation_side: the side on which long texts are cut: "right" or "left".
        model_max_length: the default of `max_length` [tokens]; 10^30 means no limit.
        newline: "space" turns newlines into spaces, as published. "eos" turns each run of newlines into `</s>`, as XGLM
            saw between paragraphs in training.
        init_kwargs: the other keys of `tokenizer_config.json`.

    Raises:
        CheckpointError: `vocab_file` cannot be read, has another format, or is not in fairseq's order.
        InputError: an argument is invalid.
    """

    _vocabulary_names = (VOCAB_FILE, TOKENIZER_FILE)

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        sep_token: Any = "</s>",
        cls_token: Any = "<s>",
        unk_token: Any = "<unk>",
        pad_token: Any = "<pad>",
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        roles = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "sep_token": sep_token,
            "cls_token": cls_token,
            "unk_token": unk_token,
            "pad_token": pad_token,
        }
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        super().__init__(VocabularyFile.read(vocab_file), roles, self.sp_model_kwargs, **kwargs)
        self.init_kwargs["sp_model_kwargs"] = self.sp_model_kwargs
        self.vocab_file = str(vocab_file)

    @classmethod
    def _files_of(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        published, other = Path(folder) / VOCAB_FILE, Path(folder) / TOKENIZER_FILE
        return {"vocab_file": other if other.exists() and not published.exists() else published}

    # SentencePiece's own pickling would lose the options.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "sp_model"}

    @functools.cached_property
    def sp_model(self) -> SentencePieceProcessor:
        """The SentencePiece processor of the published file; its ids are one lower than ours."""
        processor = SentencePieceProcessor(**self.sp_model_kwargs)
        processor.load_from_serialized_proto(with_dummy_prefix(self._sentencepiece_model(), self.add_prefix_space))
        return processor
