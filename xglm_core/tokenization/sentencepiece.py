"""`XGLMTokenizer`: text to token ids and back, on the SentencePiece library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from sentencepiece import SentencePieceProcessor

from xglm_core.errors import CheckpointError, InputError
from xglm_core.files import replacing
from xglm_core.tokenization.encoding import BatchEncoding, as_ids, encode_batch
from xglm_core.tokenization.vocabulary import Vocabulary

VOCAB_FILE = "sentencepiece.bpe.model"  # The published name, although the model in it is a unigram model.
CONFIG_FILE = "tokenizer_config.json"

_ROLES = ("bos_token", "eos_token", "sep_token", "cls_token", "unk_token", "pad_token")
_WORD_BEGIN = "▁"


class _IdOf:
    """The id of the special token that another attribute names: `eos_token_id` for `eos_token`; None for None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, tokenizer: XGLMTokenizer, owner: type | None = None) -> int | None:
        return tokenizer._special_id(self._role, getattr(tokenizer, self._role))


class XGLMTokenizer:
    """Text to token ids and back, with the ids of the published vocabulary.

    A text becomes `</s> X`, a pair `</s> A </s></s> B`: in training each text followed the end of another one, so
    `</s>` is what XGLM expects first; `<s>` was not used. SentencePiece normalises the text: NFKC, each run of white
    space or newlines becomes one space, and none stays at the ends. Special tokens inside a text, such as "</s>",
    become their ids.

    Args:
        vocab_file: the SentencePiece model.
        bos_token, eos_token, sep_token, cls_token, unk_token, pad_token: the special token in each role, or None;
            one of `<s>`, `<pad>`, `</s>`, `<unk>` and the `<madeupword>`s.
        sp_model_kwargs: arguments of `SentencePieceProcessor`, e.g. `enable_sampling`, `nbest_size` and `alpha`.
        kwargs: `padding_side`, and other keys of `tokenizer_config.json`, which are kept for `save_pretrained`.

    Attributes:
        padding_side: where a batch is padded unless the call says; "right" as published, or "left".
        init_kwargs: the other keys of `tokenizer_config.json`.

    Raises:
        CheckpointError: `vocab_file` cannot be read, or is no SentencePiece model in fairseq's order.
        InputError: a special token is not in the vocabulary.
    """

    bos_token_id = _IdOf()
    eos_token_id = _IdOf()
    sep_token_id = _IdOf()
    cls_token_id = _IdOf()
    unk_token_id = _IdOf()
    pad_token_id = _IdOf()

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        bos_token: str | None = "<s>",
        eos_token: str | None = "</s>",
        sep_token: str | None = "</s>",
        cls_token: str | None = "<s>",
        unk_token: str | None = "<unk>",
        pad_token: str | None = "<pad>",
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_file = str(vocab_file)
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        try:
            model = Path(vocab_file).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{vocab_file}: cannot be read: {error.strerror or error}; expected a SentencePiece model"
            ) from None
        self._vocabulary = Vocabulary(model, self.vocab_file, self.sp_model_kwargs)
        self.bos_token = _content(bos_token)
        self.eos_token = _content(eos_token)
        self.sep_token = _content(sep_token)
        self.cls_token = _content(cls_token)
        self.unk_token = _content(unk_token)
        self.pad_token = _content(pad_token)
        self.padding_side: str = kwargs.pop("padding_side", "right")
        self.init_kwargs = kwargs
        for role in _ROLES:
            self._special_id(role, getattr(self, role))
        # What other tokenizers add to the vocabulary would be split into pieces here: refuse rather than mislead.
        for token in kwargs.get("additional_special_tokens") or []:
            self._special_id("additional_special_tokens", _content(token))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Opens the tokenizer of a checkpoint folder.

        Args:
            folder: holds `sentencepiece.bpe.model`, and may hold `tokenizer_config.json`.
            kwargs: constructor arguments that take precedence over `tokenizer_config.json`.

        Raises:
            CheckpointError: a file is missing, damaged, or not that of an XGLM tokenizer.
            InputError: a special token is not in the vocabulary.
        """
        path = Path(folder) / CONFIG_FILE
        values: Any = {}
        if path.exists():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: expected a JSON object, but it cannot be read: {error}") from None
            if not isinstance(values, dict):
                raise CheckpointError(f"{path}: expected a JSON object, found a {type(values).__name__}")
        return cls(**{**values, "vocab_file": Path(folder) / VOCAB_FILE, **kwargs})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the vocabulary, byte for byte, and `tokenizer_config.json` into `folder`, created if it is missing."""
        special = self._vocabulary.special_ids
        values = {
            "additional_special_tokens": [token for token in special if token.startswith("<madeupword")],
            **self.init_kwargs,
            **{role: getattr(self, role) for role in _ROLES},
            "sp_model_kwargs": self.sp_model_kwargs,
            "tokenizer_class": "XGLMTokenizer",
        }
        if self.padding_side != "right":  # Absent from the published files.
            values["padding_side"] = self.padding_side
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((VOCAB_FILE, self._vocabulary.model), (CONFIG_FILE, text.encode())):
            with replacing(folder / name) as file:
                file.write(content)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Turns one text or several into the inputs of a model.

        Args:
            text: a string, or a list of them.
            padding: True or "longest" pads each text of a list to the length of the longest.
            padding_side: "right", or "left" as generation needs it; None follows the attribute.
            add_special_tokens: whether each text begins with `</s>`.
            return_tensors: None for lists; "np", "pt", "tf" or "jax" for tensors [texts, length], where a single
                text is one row.

        Returns:
            `input_ids` and `attention_mask` (1 for tokens, 0 for padding).

        Raises:
            InputError: a text is no string or has no UTF-8 encoding, there is no `pad_token` to pad with, texts of
                different lengths are to be a tensor without padding, or an option is unknown.
            BackendError: the framework that `return_tensors` needs is not installed.
        """
        if padding not in (False, True, "longest"):
            raise InputError(f"padding is {padding!r}, expected True, False or 'longest'")
        if padding and self.pad_token_id is None:
            raise InputError(
                "padding needs a pad token, but pad_token is None; set tokenizer.pad_token, e.g. to '<pad>'"
            )
        texts: Sequence[Any] = text if isinstance(text, list | tuple) else [text]
        rows = [self._vocabulary.encode(item) for item in texts]
        if add_special_tokens:
            rows = [self.build_inputs_with_special_tokens(row) for row in rows]
        batch = encode_batch(
            rows,
            pad_token_id=self.pad_token_id if padding else None,
            padding_side=self.padding_side if padding_side is None else padding_side,
            return_tensors=return_tensors,
        )
        if texts is not text and return_tensors is None:
            return BatchEncoding({name: values[0] for name, values in batch.items()})
        return batch

    def encode(self, text: str, *, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        """The ids of one text: a list, or a tensor [1, length]; see `__call__`."""
        return self(text, add_special_tokens=add_special_tokens, return_tensors=return_tensors).input_ids

    def tokenize(self, text: str) -> list[str]:
        """The tokens of one text, without the leading `</s>`; unknown ones appear as the text's own characters.

        Raises:
            InputError: `text` is no string or has no UTF-8 encoding.
        """
        return self._vocabulary.tokenize(text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`</s> X` for one sequence of ids, `</s> A </s></s> B` for two; `</s>` is `sep_token`, if there is one."""
        sep = [] if self.sep_token_id is None else [self.sep_token_id]
        return sep + token_ids_0 if token_ids_1 is None else sep + token_ids_0 + sep + sep + token_ids_1

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of a sequence of ids.

        Differs from SentencePiece, which drops `<s>` and `</s>` and prints `<unk>` as " ⁇ ": special tokens are text
        here, or are dropped.

        Args:
            token_ids: an id, or a list, array or tensor [length] of them.
            skip_special_tokens: whether to drop special tokens, `<unk>` among them.

        Raises:
            InputError: not a sequence of ids of the vocabulary.
        """
        tokens = self.convert_ids_to_tokens(np.atleast_1d(as_ids(token_ids, self.vocab_size)), skip_special_tokens)
        return "".join(tokens).replace(_WORD_BEGIN, " ").strip()

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """`decode` for each of several sequences, e.g. the rows that `generate` returns."""
        return [self.decode(sequence, skip_special_tokens) for sequence in sequences]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or the list of ids of several; that of `<unk>` for what is not in the vocabulary."""
        if isinstance(tokens, str):
            return self._vocabulary.id_of(tokens)
        return [self._vocabulary.id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the list of tokens of a sequence of ids; arguments and errors as of `decode`."""
        numbers: Any = as_ids(ids, self.vocab_size).tolist()
        if isinstance(numbers, int):
            return self._vocabulary.token_of(numbers)
        dropped = self._vocabulary.special_tokens if skip_special_tokens else {}
        return [self._vocabulary.token_of(number) for number in numbers if number not in dropped]

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""
        return {self._vocabulary.token_of(number): number for number in range(self.vocab_size)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included; also `len(tokenizer)`."""
        return self._vocabulary.size

    @property
    def sp_model(self) -> SentencePieceProcessor:
        """The SentencePiece processor."""
        return self._vocabulary.processor

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that `skip_special_tokens` drops."""
        return list(self._vocabulary.special_ids)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return list(self._vocabulary.special_ids.values())

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"XGLMTokenizer({self.vocab_file!r}, vocab_size={self.vocab_size}, padding_side={self.padding_side!r})"

    def _special_id(self, role: str, token: str | None) -> int | None:
        special = self._vocabulary.special_ids
        if token is not None and token not in special:
            raise InputError(f"tokenizer: {role} is {token!r}, expected None or one of {', '.join(special)}")
        return None if token is None else special[token]


def _content(token: Any) -> Any:
    """A token as text; newer files of transformers describe some tokens by an object."""
    return token.get("content") if isinstance(token, dict) else token
