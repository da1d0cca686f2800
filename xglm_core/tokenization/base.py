"""The common base of both tokenizers: construction, files, and decoding."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import inspect
import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from xglm_core.errors import CheckpointError, InputError
from xglm_core.hub import Source, find_source
from xglm_core.keywords import split_options
from xglm_core.tokenization.added_tokens import AddedToken
from xglm_core.tokenization.arguments import one_of, warn
from xglm_core.tokenization.decoding import text_of, tidied
from xglm_core.tokenization.encoder import Encoder
from xglm_core.tokenization.encoding import as_ids
from xglm_core.tokenization.model_file import MADEUP_WORDS, with_dummy_prefix
from xglm_core.tokenization.pretrained import NO_LIMIT, SETTINGS_FILES, read_settings, settings_files, write_files
from xglm_core.tokenization.special_tokens import ROLES
from xglm_core.tokenization.tokenizer_json import write_tokenizer_json
from xglm_core.tokenization.vocabulary import Vocabulary, trained_model
from xglm_core.tokenization.vocabulary_file import VocabularyFile

VOCAB_FILE = "sentencepiece.bpe.model"  # The published name, although it holds a unigram model.
TOKENIZER_FILE = "tokenizer.json"

# Keywords of `from_pretrained` for other tokenizers.
_NOTHING_TO_CHOOSE = ("use_fast", "from_slow", "legacy")
_REFUSED = {
    "tokenizer_object": "pass tokenizer_file, or a folder to from_pretrained",
    "add_bos_token": "a text begins with sep_token; set that, or add ids to the result",
    "add_eos_token": "nothing ends a text; add the id to the result",
}


class Tokenizer(Encoder, abc.ABC):
    """Text to token ids and back; see `XGLMTokenizer`.

    Args:
        file: the vocabulary that was read.
        roles: the special token in each role, or None.
        options: arguments of `SentencePieceProcessor`.
        kwargs: the other arguments of `XGLMTokenizer`.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE, "tokenizer_file": TOKENIZER_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    is_fast = False
    _vocabulary_names: ClassVar[tuple[str, ...]]  # In order of preference.

    def __init__(
        self,
        file: VocabularyFile,
        roles: Mapping[str, Any],
        options: dict[str, Any],
        *,
        mask_token: Any = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: float | None = None,
        model_input_names: Iterable[str] | None = None,
        newline: str = "space",
        split_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        add_prefix_space: bool | None = None,
        additional_special_tokens: Iterable[Any] | None = None,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        name_or_path: str = "",
        **kwargs: Any,
    ) -> None:
        self._file = file
        self._warned = set()
        _check_unknown(type(self), kwargs)
        try:
            added = {int(number): AddedToken.of(token) for number, token in (added_tokens_decoder or {}).items()}
            model = with_dummy_prefix(file.model, add_prefix_space)
            vocabulary = Vocabulary(model, file.added | added, options)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(f"{file.path}: the vocabulary cannot be loaded: {error}") from None
        if additional_special_tokens is None:
            additional_special_tokens = [token for token in MADEUP_WORDS if token in vocabulary.special_ids]
        roles = {**roles, "mask_token": mask_token}
        super().__init__(vocabulary, roles, additional_special_tokens)
        self.padding_side = one_of("padding_side", padding_side, ("right", "left"))
        self.truncation_side = one_of("truncation_side", truncation_side, ("right", "left"))
        self.model_max_length = _limit(model_max_length)
        self.model_input_names = list(self.model_input_names if model_input_names is None else model_input_names)
        self.newline = one_of("newline", newline, ("space", "eos"))
        self.split_special_tokens = bool(split_special_tokens)
        self.clean_up_tokenization_spaces = bool(clean_up_tokenization_spaces)
        self.add_prefix_space = add_prefix_space
        self.name_or_path = str(name_or_path)
        self.init_inputs = ()
        self.init_kwargs = {**roles, **kwargs}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Opens the tokenizer of a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder with `sentencepiece.bpe.model` or `tokenizer.json`, and perhaps
                `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`. Or the id of a repository of
                the Hugging Face Hub; only these files are downloaded, and only one of the first two.
            kwargs: constructor arguments, which take precedence over these files; `HubOptions`; and keywords of
                transformers, see `xglm_core.keywords`. `use_fast`, `from_slow` and `legacy` have no effect.

        Raises:
            CheckpointError: a file is missing, damaged, not that of an XGLM tokenizer, or cannot be downloaded.
            BackendError: the hub needs a package that is not installed.
        """
        hub, options = split_options({k: v for k, v in kwargs.items() if k not in _NOTHING_TO_CHOOSE})
        place = os.path.join(pretrained_model_name_or_path, *filter(None, [hub.get("subfolder")]))
        source = find_source(pretrained_model_name_or_path, **hub)
        return cls.from_source(source, **{"name_or_path": place, **options})

    @classmethod
    def from_source(cls, source: Source, **kwargs: Any) -> Self:
        """`from_pretrained` for a source that was already found."""
        vocabulary = next((name for name in cls._vocabulary_names if name in source.names), cls._vocabulary_names[0])
        folder = source.fetch([vocabulary], SETTINGS_FILES)
        settings = read_settings(folder)
        # Unknown keys of a file are kept for `save_pretrained`. Unknown keywords of the caller cause a warning.
        others = {name: settings.pop(name) for name in [*settings] if name not in _known(cls)}
        tokenizer = cls(**{**settings, **cls._files_of(folder), **kwargs})
        tokenizer.init_kwargs = others | tokenizer.init_kwargs
        return tokenizer

    @classmethod
    @abc.abstractmethod
    def _files_of(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """The constructor arguments that name the vocabulary in a folder."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
    ) -> tuple[str, ...]:
        """Writes the vocabulary and all settings.

        Args:
            save_directory: the folder, created if it is missing.
            legacy_format: True writes only the SentencePiece model, False only `tokenizer.json`. None writes both, as
                version 5 of transformers reads only the latter. The file that does not belong to this class is left out
                if it cannot express the vocabulary.
            filename_prefix: a prefix of the file names, before a hyphen.
            push_to_hub: not offered.

        Returns:
            The paths.

        Raises:
            CheckpointError: a file cannot express the vocabulary.
            InputError: `push_to_hub` is set.
        """
        if push_to_hub:
            raise InputError("push_to_hub is not offered; save, then call huggingface_hub.upload_folder")
        files = self._vocabulary_files(legacy_format) | settings_files(self)
        return write_files(save_directory, files, filename_prefix)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes only the vocabulary, as `save_pretrained` does; returns the paths."""
        return write_files(save_directory, self._vocabulary_files(), filename_prefix)

    def _vocabulary_files(self, legacy_format: bool | None = None) -> dict[str, bytes]:
        """The content of the vocabulary's files by name, that of this class first."""
        content = {VOCAB_FILE: self._sentencepiece_model, TOKENIZER_FILE: self._tokenizer_json}
        if legacy_format is not None:
            name = VOCAB_FILE if legacy_format else TOKENIZER_FILE
            return {name: content[name]()}
        own, other = self._vocabulary_names
        files = {own: content[own]()}
        with contextlib.suppress(CheckpointError):
            files[other] = content[other]()
        return files

    def _sentencepiece_model(self) -> bytes:
        return self._file.sentencepiece_model(self.vocab_size)

    def _tokenizer_json(self) -> bytes:
        try:
            return write_tokenizer_json(self.vocabulary.model, self.vocabulary.found, self.sep_token)
        except ValueError as error:
            raise CheckpointError(f"{self._file.path}: {error}") from None

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[Any],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Iterable[Any] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Trains a unigram vocabulary on texts; returns a tokenizer with the settings and added tokens of this one.

        Args:
            text_iterator: texts, or lists of texts.
            vocab_size: the largest number of ids, including special ones. Small texts give fewer.
            length: not used.
            new_special_tokens: further special tokens.
            special_tokens_map: new names of special tokens with a role.
            kwargs: other arguments of `SentencePieceTrainer`.

        Raises:
            InputError: SentencePiece cannot make a vocabulary of these texts.
        """
        texts = itertools.chain.from_iterable([item] if isinstance(item, str) else item for item in text_iterator)
        names = special_tokens_map or {}

        def renamed(token: AddedToken) -> AddedToken:
            return dataclasses.replace(token, content=names.get(token.content, token.content))

        roles = self.special_tokens_map_extended
        with tempfile.TemporaryDirectory() as folder:
            write_files(
                folder, {VOCAB_FILE: trained_model(texts, vocab_size, kwargs)} | settings_files(self, added=False)
            )
            additional = [*map(renamed, roles.pop("additional_special_tokens", [])), *(new_special_tokens or [])]
            given: dict[str, Any] = {role: renamed(roles[role]) if role in roles else None for role in ROLES}
            new = type(self).from_pretrained(folder, **given, additional_special_tokens=additional)
        new.add_tokens([token for token in self.vocabulary.added.values() if token.content not in names])
        new.name_or_path = self.name_or_path
        return new

    @property
    def can_save_slow_tokenizer(self) -> bool:
        """Whether the SentencePiece model can be saved; false only for vocabularies of another order."""
        try:
            return bool(self._sentencepiece_model())
        except CheckpointError:
            return False

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        newline: str | None = None,
        spaces_between_special_tokens: bool = False,
    ) -> str:
        """The text of a sequence of ids.

        SentencePiece itself drops `<s>` and `</s>`, and prints `<unk>` as " ⁇ ". Here, special tokens are either text
        or dropped.

        Args:
            token_ids: an id, or a list, array or tensor [length] of them.
            skip_special_tokens: whether to drop special tokens, including `<unk>`.
            clean_up_tokenization_spaces: whether to drop the spaces before English marks and endings; None follows the
                attribute.
            newline: with "eos", each `</s>` is a line break, except at the begin of the text; None follows the
                attribute.
            spaces_between_special_tokens: whether special and added tokens get a space on each side.

        Raises:
            InputError: not a sequence of ids of the vocabulary.
        """
        ids = np.atleast_1d(as_ids(token_ids, len(self))).tolist()
        line_break = self._line_break(newline)
        if line_break is None:
            text = self._text(ids, skip_special_tokens, spaces_between_special_tokens)
        else:
            # At the begin of the text, after padding, `</s>` is not a line break.
            begin = next((place for place, number in enumerate(ids) if number != self.pad_token_id), len(ids))
            begin += ids[begin : begin + 1] == [self.sep_token_id]
            lines: list[list[int]] = [[]]
            for number in ids[begin:]:
                if number == line_break:
                    lines.append([])
                else:
                    lines[-1].append(number)
            options = (skip_special_tokens, spaces_between_special_tokens)
            text = "\n".join(self._text(line, *options) for line in lines)
            head = self._text(ids[:begin], *options)
            text = f"{head} {text}".rstrip(" ") if head else text
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return tidied(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """`decode` for each of several sequences, e.g. the rows that `generate` returns."""
        return [self.decode(sequence, skip_special_tokens, **kwargs) for sequence in sequences]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or a list of ids; unknown tokens get the id of `<unk>`."""
        if isinstance(tokens, str):
            return self.vocabulary.id_of(tokens)
        if not isinstance(tokens, Iterable):
            raise InputError(f"tokens is {tokens!r:.80}, expected a string or a list of strings")
        return [self.vocabulary.id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or a list of tokens; see `decode` for arguments and errors."""
        numbers: Any = as_ids(ids, len(self)).tolist()
        if isinstance(numbers, int):
            return self.vocabulary.tokens[numbers]
        return self._tokens(numbers, skip_special_tokens)

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens."""
        return text_of(tokens, self.vocabulary.byte_tokens)

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids, including added tokens."""
        return {token: number for number, token in enumerate(self.vocabulary.tokens)}

    @property
    def vocab(self) -> dict[str, int]:
        """`get_vocab()`."""
        return self.get_vocab()

    @property
    def max_len_single_sentence(self) -> int:
        """The number of tokens of a text that fit into `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """The number of tokens of a pair that fit into `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    @property
    def vocab_size(self) -> int:
        """The number of ids of the vocabulary file, with special ones; `len(tokenizer)` also counts added tokens."""
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

    def _text(self, ids: list[int], skip_special_tokens: bool, spaces: bool) -> str:
        if not spaces:
            return self.convert_tokens_to_string(self._tokens(ids, skip_special_tokens))
        found = self.vocabulary.found
        runs = itertools.groupby(ids, key=lambda number: number if number in found else -1)
        texts = [self._text(list(run), skip_special_tokens, False) for _, run in runs]
        return " ".join(filter(None, texts))


def _known(kind: type) -> set[str]:
    """The names of the constructor's keywords."""
    names = {*inspect.signature(kind).parameters, *inspect.signature(Tokenizer).parameters}
    return names - {"file", "roles", "options", "kwargs"}


def _check_unknown(kind: type, kwargs: Mapping[str, Any]) -> None:
    """Refuses keywords that are names of methods; warns of other unknown ones, which have no effect."""
    for name in kwargs:
        if callable(getattr(kind, name, None)):
            raise InputError(f"{name} is a method of {kind.__name__}, not an argument of the constructor; call it")
        if name in _REFUSED:
            raise InputError(f"{name} is not offered by {kind.__name__}: {_REFUSED[name]}")
    if kwargs:
        warn(f"{kind.__name__}: {', '.join(kwargs)} changes nothing; it is kept in init_kwargs and saved")


def _limit(model_max_length: float | None) -> int:
    """A limit as an integer, at most `NO_LIMIT`, which transformers sometimes writes as a float."""
    if model_max_length is None or model_max_length >= NO_LIMIT:
        return NO_LIMIT
    if isinstance(model_max_length, bool) or model_max_length < 0 or model_max_length != int(model_max_length):
        raise InputError(f"model_max_length is {model_max_length!r}, expected a number of tokens")
    return int(model_max_length)
