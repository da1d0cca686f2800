"""What both tokenizers do, over a vocabulary: their construction, their files, and ids back to text."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from xglm_core.errors import CheckpointError, InputError
from xglm_core.hub import HubOptions, Source, find_source
from xglm_core.tokenization.added_tokens import AddedToken
from xglm_core.tokenization.arguments import one_of
from xglm_core.tokenization.decoding import text_of, tidied
from xglm_core.tokenization.encoder import Encoder
from xglm_core.tokenization.encoding import as_ids
from xglm_core.tokenization.model_file import MADEUP_WORDS
from xglm_core.tokenization.pretrained import NO_LIMIT, SETTINGS_FILES, read_settings, settings_files, write_files
from xglm_core.tokenization.vocabulary import Vocabulary
from xglm_core.tokenization.vocabulary_file import VocabularyFile

VOCAB_FILE = "sentencepiece.bpe.model"  # The published name, although the model in it is a unigram model.
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(Encoder, abc.ABC):
    """Text to token ids and back; see `XGLMTokenizer`.

    Args:
        file: what was read of the vocabulary.
        roles: the special token in each role, or None.
        options: arguments of `SentencePieceProcessor`.
        kwargs: the other arguments of `XGLMTokenizer`.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE, "tokenizer_file": TOKENIZER_FILE}  # noqa: RUF012
    model_input_names = ("input_ids", "attention_mask")
    is_fast = False
    _vocabulary_names: ClassVar[tuple[str, ...]]  # In the order of preference.

    def __init__(
        self,
        file: VocabularyFile,
        roles: Mapping[str, Any],
        options: dict[str, Any],
        *,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int | None = None,
        newline: str = "space",
        additional_special_tokens: Iterable[Any] | None = None,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._file = file
        try:
            added = {int(number): AddedToken.of(token) for number, token in (added_tokens_decoder or {}).items()}
            vocabulary = Vocabulary(file.model, file.added | added, options)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(f"{file.path}: the vocabulary cannot be loaded: {error}") from None
        if additional_special_tokens is None:
            additional_special_tokens = [token for token in MADEUP_WORDS if token in vocabulary.special_ids]
        super().__init__(vocabulary, roles, additional_special_tokens)
        self.padding_side = one_of("padding_side", padding_side, ("right", "left"))
        self.truncation_side = one_of("truncation_side", truncation_side, ("right", "left"))
        self.model_max_length = NO_LIMIT if model_max_length is None else model_max_length
        self.newline = one_of("newline", newline, ("space", "eos"))
        self.init_kwargs = kwargs

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Opens the tokenizer of a checkpoint.

        Args:
            folder: holds `sentencepiece.bpe.model` or `tokenizer.json`, and may hold `tokenizer_config.json`,
                `special_tokens_map.json` and `added_tokens.json`. Or the id of a repository of the Hugging Face Hub, of
                which these alone are downloaded, and only one of the first two.
            kwargs: constructor arguments that take precedence over these files; and those of `HubOptions`.

        Raises:
            CheckpointError: a file is missing, damaged, not that of an XGLM tokenizer, or cannot be downloaded.
            BackendError: the hub needs a package that is not installed.
        """
        hub: Any = {name: kwargs.pop(name) for name in HubOptions.__annotations__ if name in kwargs}
        return cls.from_source(find_source(folder, **hub), **kwargs)

    @classmethod
    def from_source(cls, source: Source, **kwargs: Any) -> Self:
        """`from_pretrained`, of a source that has been found already."""
        vocabulary = next((name for name in cls._vocabulary_names if name in source.names), cls._vocabulary_names[0])
        folder = source.fetch([vocabulary], SETTINGS_FILES)
        return cls(**{**read_settings(folder), **cls._files_of(folder), **kwargs})

    @classmethod
    @abc.abstractmethod
    def _files_of(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """The constructor arguments that name the vocabulary in a folder."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes the vocabulary and all settings into `folder`, created if it is missing; returns the paths."""
        return self.save_vocabulary(folder) + write_files(folder, settings_files(self))

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes the vocabulary alone into a folder; returns the paths.

        Args:
            save_directory: the folder, created if it is missing.
            filename_prefix: what the file names begin with, before a hyphen.
        """
        return write_files(save_directory, self._vocabulary_files(), filename_prefix)

    @abc.abstractmethod
    def _vocabulary_files(self) -> dict[str, bytes]:
        """The content of the vocabulary's files by name."""

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        newline: str | None = None,
    ) -> str:
        """The text of a sequence of ids.

        Differs from SentencePiece, which drops `<s>` and `</s>` and prints `<unk>` as " ⁇ ": special tokens are text
        here, or are dropped.

        Args:
            token_ids: an id, or a list, array or tensor [length] of them.
            skip_special_tokens: whether to drop special tokens, `<unk>` among them.
            clean_up_tokenization_spaces: whether to drop the spaces before English marks and endings.
            newline: with "eos", each `</s>` but one that begins the text is a line break; None follows the attribute.

        Raises:
            InputError: not a sequence of ids of the vocabulary.
        """
        ids = np.atleast_1d(as_ids(token_ids, len(self))).tolist()
        line_break = self._line_break(newline)
        if line_break is None:
            text = self._text(ids, skip_special_tokens)
        else:
            # What begins the text, after padding on the left, is no line break.
            begin = next((place for place, number in enumerate(ids) if number != self.pad_token_id), len(ids))
            begin += ids[begin : begin + 1] == [self.sep_token_id]
            lines: list[list[int]] = [[]]
            for number in ids[begin:]:
                if number == line_break:
                    lines.append([])
                else:
                    lines[-1].append(number)
            text = "\n".join(self._text(line, skip_special_tokens) for line in lines)
            head = self._text(ids[:begin], skip_special_tokens)
            text = f"{head} {text}".rstrip(" ") if head else text
        return tidied(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """`decode` for each of several sequences, e.g. the rows that `generate` returns."""
        return [self.decode(sequence, skip_special_tokens, **kwargs) for sequence in sequences]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or the list of ids of several; that of `<unk>` for what is not in the vocabulary."""
        if isinstance(tokens, str):
            return self.vocabulary.id_of(tokens)
        if not isinstance(tokens, Iterable):
            raise InputError(f"tokens is {tokens!r:.80}, expected a string or a list of strings")
        return [self.vocabulary.id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the list of tokens of a sequence of ids; arguments and errors as of `decode`."""
        numbers: Any = as_ids(ids, len(self)).tolist()
        if isinstance(numbers, int):
            return self.vocabulary.tokens[numbers]
        return self._tokens(numbers, skip_special_tokens)

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens."""
        return text_of(tokens, self.vocabulary.byte_tokens)

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids, added ones included."""
        return {token: number for number, token in enumerate(self.vocabulary.tokens)}

    @property
    def vocab_size(self) -> int:
        """Number of ids of the vocabulary file, special ones included; `len(tokenizer)` counts added tokens, too."""
        return self.vocabulary.base_size

    def __len__(self) -> int:
        return len(self.vocabulary.tokens)

    def __repr__(self) -> str:
        name, file = type(self).__name__, self._file.path
        return f"{name}({file!r}, vocab_size={self.vocab_size}, padding_side={self.padding_side!r})"

    def _tokens(self, ids: list[int], skip_special_tokens: bool) -> list[str]:
        tokens = self.vocabulary.tokens
        if not skip_special_tokens:
            return [tokens[number] for number in ids]
        dropped = {*self.vocabulary.special_ids.values()}
        return [tokens[number] for number in ids if number not in dropped]

    def _text(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.convert_tokens_to_string(self._tokens(ids, skip_special_tokens))
