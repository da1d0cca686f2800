"""From texts to the inputs of a model: batches, pairs, truncation, padding, tensors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xglm_core.errors import InputError, InputTypeError
from xglm_core.python_values import plain
from xglm_core.tokenization import batching
from xglm_core.tokenization.alignment import encodings_of, words_of
from xglm_core.tokenization.arguments import as_batch, as_lists, one_of, warn
from xglm_core.tokenization.batching import SPECIAL, STRATEGIES, Columns, Truncation
from xglm_core.tokenization.encoding import BatchEncoding, as_ids, as_tensors, tensor_type
from xglm_core.tokenization.garbage_collection import without_collection
from xglm_core.tokenization.pretrained import NO_LIMIT
from xglm_core.tokenization.templates import Templates

_SIDES = ("right", "left")


class Encoder(Templates):
    """The part of a tokenizer that turns texts into ids.

    Attributes:
        padding_side, truncation_side: "right" or "left".
        model_max_length: the largest number of tokens of a row.
        newline: "space" or "eos".
        split_special_tokens: whether special tokens in a text are treated as ordinary text.
        pad_token_type_id: 0, because XGLM has one type of tokens.
    """

    padding_side: str
    truncation_side: str
    model_max_length: int
    newline: str
    split_special_tokens: bool
    model_input_names: list[str]
    pad_token_type_id = 0
    _warned: set[str]  # The warnings that were already given.

    @without_collection
    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        newline: str | None = None,
    ) -> BatchEncoding:
        """Turns texts into the inputs of a model.

        Args:
            text: a string, or a list of them; pairs may be given as a list of tuples.
            text_pair: the second text of a pair, or a list of them.
            text_target, text_pair_target: texts whose ids are returned as `labels`; without `text`, as `input_ids`.
            add_special_tokens: whether to make `</s> X` of a text, and `</s> A </s></s> B` of a pair.
            padding: True or "longest" pads to the length of the longest row, "max_length" to `max_length`.
            truncation: True or "longest_first" shortens rows to `max_length`, of a pair the longer text first;
                "only_first" and "only_second" shorten one text of a pair. None truncates where `max_length` is given
                without padding.
            max_length: the length of a row [tokens]; None means `model_max_length`.
            stride: the number of tokens that an overflowing row repeats of its neighbour.
            is_split_into_words: whether each text is a list of words, which are encoded one by one.
            pad_to_multiple_of: the length of padded rows is rounded up to a multiple of this.
            padding_side: "right", or "left" as generation needs it; None follows the attribute.
            return_tensors: None for lists; "np", "pt", "tf" or "jax" for tensors [rows, length], also for a single
                text.
            return_token_type_ids: whether to return `token_type_ids`, which are 0.
            return_attention_mask: False leaves it out.
            return_overflowing_tokens: whether to return truncated tokens in further rows. Then
                `overflow_to_sample_mapping` has the index of the text of each row, and a single text has rows, too.
            return_special_tokens_mask: whether to return `special_tokens_mask`, 1 for added tokens and padding.
            return_offsets_mapping: whether to return `offset_mapping`: begin and end of each token [characters] in its
                text or word, (0, 0) for added tokens.
            return_length: whether to return `length`: the length of each row before padding.
            verbose: whether to warn once of rows that are longer than `model_max_length`.
            split_special_tokens: whether special tokens in a text, such as "</s>", are treated as ordinary text; None
                follows the attribute.
            newline: "space" or "eos"; None follows the attribute.

        Returns:
            `input_ids`, `attention_mask` (1 for tokens, 0 for padding), and the other requested values.

        Raises:
            InputError: a text is not a string or has no UTF-8 encoding, an option is unknown or needs another one, or a
                tensor is requested of rows of different lengths.
            BackendError: the framework that `return_tensors` needs is not installed.
        """
        if text_target is not None:
            options: Any = dict(locals())
            for name in ("self", "text", "text_pair", "text_target", "text_pair_target"):
                del options[name]
            target = self(text_target, text_pair_target, **options)
            if text is None:
                return target
            source = self(text, text_pair, **options)
            source["labels"] = target["input_ids"]
            return source
        firsts, seconds, single = as_batch(text, text_pair, is_split_into_words)
        line_break, split = self._line_break(newline), self._split(split_special_tokens)

        def columns(offsets: bool, sources: bool) -> tuple[Columns, Columns | None]:
            how = (is_split_into_words, offsets, sources, line_break, split)
            return self._columns(firsts, 0, *how), None if seconds is None else self._columns(seconds, 1, *how)

        return self._prepared(
            columns,
            seconds is not None,
            single,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
            return_token_type_ids=return_token_type_ids,
            return_attention_mask=return_attention_mask,
            return_overflowing_tokens=return_overflowing_tokens,
            return_special_tokens_mask=return_special_tokens_mask,
            return_offsets_mapping=return_offsets_mapping,
            return_length=return_length,
            verbose=verbose,
        )

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """The call for a text or a pair."""
        return self(text, text_pair, **kwargs)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **kwargs: Any) -> BatchEncoding:
        """The call for a list of texts or pairs."""
        if not isinstance(batch_text_or_text_pairs, list | tuple):
            raise InputTypeError(
                f"batch_text_or_text_pairs is {batch_text_or_text_pairs!r:.80}, expected a list of texts"
            )
        return self(batch_text_or_text_pairs, **kwargs)

    def prepare_seq2seq_batch(
        self,
        src_texts: list[str],
        tgt_texts: list[str] | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        padding: bool | str = "longest",
        truncation: bool | str = True,
        return_tensors: str | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> BatchEncoding:
        """The call for texts and targets, whose lengths may differ; languages have no effect."""
        options: Any = {"padding": padding, "truncation": truncation, "return_tensors": return_tensors}
        batch = self(src_texts, max_length=max_length, **options)
        if tgt_texts is not None:
            longest = max_length if max_target_length is None else max_target_length
            batch["labels"] = self(tgt_texts, max_length=longest, **options)["input_ids"]
        return batch

    def prepare_for_model(
        self, ids: Any, pair_ids: Any = None, *, prepend_batch_axis: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        """The call for ids in place of texts; its tensors are [length], or [1, length] with `prepend_batch_axis`."""
        size = len(self.vocabulary.tokens)

        def columns(offsets: bool, sources: bool) -> tuple[Columns, Columns | None]:
            first: Columns = {"input_ids": [as_ids(ids, size).tolist()]}
            return first, None if pair_ids is None else {"input_ids": [as_ids(pair_ids, size).tolist()]}

        result: dict[str, Any] = dict(self._prepared(columns, pair_ids is not None, True, **kwargs))
        if kwargs.get("return_tensors") is not None and not prepend_batch_axis and len(result["input_ids"]) == 1:
            result = {name: value[0] for name, value in result.items()}
        return BatchEncoding(result)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: bool | str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Truncates a sequence of ids, or a pair.

        Returns:
            The ids, the second ids or None, and the removed ids with `stride` of their neighbours. The last are empty
            if both sequences may have been truncated.
        """
        if truncation_strategy in (False, "do_not_truncate") or num_tokens_to_remove <= 0:
            return ids, pair_ids, []
        strategy = "longest_first" if truncation_strategy is True else str(truncation_strategy)
        room = len(ids) + len(pair_ids or ()) - num_tokens_to_remove
        side = one_of("truncation_side", self.truncation_side, _SIDES)
        one_of("truncation_strategy", strategy, STRATEGIES)
        ((first, second),) = Truncation(room, strategy, side).spans(
            len(ids), None if pair_ids is None else len(pair_ids)
        )
        shortened = pair_ids if pair_ids is not None and strategy == "only_second" else ids
        gone = min(len(shortened), num_tokens_to_remove + stride)
        over = shortened[len(shortened) - gone :] if side == "right" else shortened[:gone]
        if pair_ids is not None and strategy == "longest_first":
            over = []
        return ids[slice(*first)], None if pair_ids is None or second is None else pair_ids[slice(*second)], over

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        """The ids of a text or a pair: a list, or a tensor [1, length]; see the call for arguments and errors."""
        if text_pair is None and not kwargs and isinstance(text, str):
            ids = self.vocabulary.encode(text, self._line_break(None), self.split_special_tokens)
            sep = self.sep_token_id
            if sep is not None:
                ids.insert(0, sep)
            self._warn_of_long(len(ids))
            return ids
        return self(text, text_pair, **kwargs).input_ids

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        split_special_tokens: bool | None = None,
        newline: str | None = None,
    ) -> list[str]:
        """The tokens of a text or a pair; unknown tokens appear as the characters of the text.

        Raises:
            InputError: a text is not a string or has no UTF-8 encoding.
        """
        how = (self._line_break(newline), self._split(split_special_tokens))
        first = self.vocabulary.tokenize(text, *how)
        second = None if pair is None else self.vocabulary.tokenize(pair, *how)
        prefix, middle = self._around(second is not None) if add_special_tokens else ([], [])
        tokens = self.vocabulary.tokens
        return [*(tokens[i] for i in prefix), *first, *(tokens[i] for i in middle), *(second or [])]

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads the results of calls, for example to make a batch of examples that were encoded one by one.

        Args:
            encoded_inputs: `input_ids` and others, of one text or several, or a list of such for one text each. Unknown
                names, such as labels, are not padded.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask: see the call.
            return_tensors: see the call; None follows the type of the ids.
            verbose: ignored.

        Raises:
            InputError: see the call; or there are no `input_ids`.
        """
        if isinstance(encoded_inputs, list | tuple):
            names = {*itertools.chain.from_iterable(encoded_inputs)}
            if any(names != {*example} for example in encoded_inputs):
                raise InputError(f"encoded_inputs: not all examples have {', '.join(sorted(names))}")
            encoded_inputs = {name: [example[name] for example in encoded_inputs] for name in names}
        main = self.model_input_names[0]
        if main not in encoded_inputs:
            raise InputError(f"encoded_inputs has {', '.join(encoded_inputs) or 'nothing'}, expected {main}")
        if return_tensors is None:
            return_tensors = tensor_type(encoded_inputs[main])
        columns = {name: as_lists(value) for name, value in encoded_inputs.items()}
        columns["input_ids"] = columns.pop(main)
        single = not all(isinstance(row, list) for row in columns["input_ids"])
        if single:
            columns = {name: [value] for name, value in columns.items()}
        if self._wanted(return_attention_mask, "attention_mask"):
            columns.setdefault("attention_mask", [[1] * len(row) for row in columns["input_ids"]])
        do_pad, length = self._padding(padding, max_length)
        if do_pad:
            columns = batching.pad(
                columns,
                length=length,
                multiple_of=pad_to_multiple_of,
                side=self._padding_side(padding_side),
                pad_token_id=self.pad_token_id,
            )
        columns[main] = columns.pop("input_ids")
        if return_tensors is not None:
            return BatchEncoding(as_tensors(columns, return_tensors))
        return BatchEncoding({name: rows[0] for name, rows in columns.items()} if single else columns)

    @contextlib.contextmanager
    def as_target_tokenizer(self) -> Iterator[None]:
        """Changes nothing: the target of a language model is ordinary text."""
        yield

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered.

        Raises:
            InputError: always.
        """
        raise InputError("apply_chat_template is not offered, as XGLM knows no chats; make one text of the messages")

    def _prepared(
        self,
        columns: Callable[[bool, bool], tuple[Columns, Columns | None]],
        pair: bool,
        single: bool,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
    ) -> BatchEncoding:
        """The result of a call.

        Args:
            columns: makes columns of the first and the second texts; its arguments say whether offsets, and words and
                sequences, are needed.
            pair: whether there are second texts.
            single: whether the result is that of one text, without a batch axis.
            others: see the call.
        """
        pad, pad_length = self._padding(padding, max_length)
        if truncation is None:
            truncation = max_length is not None and not pad
            if max_length is not None and padding is True:
                warn("max_length has no effect beside padding=True; set truncation=True, or padding='max_length'")
        how = None
        if truncation not in (False, "do_not_truncate"):
            added = self.num_special_tokens_to_add(pair) if add_special_tokens else 0
            how = self._truncation(truncation, max_length, stride, return_overflowing_tokens, added)
            if how is not None and pad and pad_to_multiple_of and (how.room + added) % pad_to_multiple_of:
                raise InputError(
                    f"max_length is {how.room + added}, to which texts are truncated, expected a multiple of "
                    f"pad_to_multiple_of, {pad_to_multiple_of}"
                )
        type_ids = self._wanted(return_token_type_ids, "token_type_ids")
        mask = self._wanted(return_attention_mask, "attention_mask")

        def rows(offsets: bool, sources: bool) -> tuple[dict[str, Any], list[int], list[int] | None]:
            first, second = columns(offsets, sources)
            samples = None
            if how is not None:
                first, second, samples = batching.truncated(first, second, how)
            for part in (first, second) if return_special_tokens_mask or type_ids else ():
                if part is not None:
                    zeros = [[0] * len(row) for row in part["input_ids"]]
                    if return_special_tokens_mask:
                        part["special_tokens_mask"] = zeros
                    if type_ids:
                        part["token_type_ids"] = [list(row) for row in zeros]
            joined: dict[str, Any] = self._joined(first, second, add_special_tokens)
            lengths = [len(row) for row in joined["input_ids"]]
            if sources or mask:
                joined["attention_mask"] = [[1] * length for length in lengths]
            if pad:
                joined = batching.pad(
                    joined,
                    length=pad_length,
                    multiple_of=pad_to_multiple_of,
                    side=self._padding_side(padding_side),
                    pad_token_id=self.pad_token_id,
                )
            return joined, lengths, samples

        sampling = self.vocabulary.samples  # Then a second pass would split texts differently.
        joined, lengths, samples = rows(return_offsets_mapping or sampling, sampling)
        encodings: Any = lambda: encodings_of(rows(True, True)[0], self.vocabulary.tokens)  # noqa: E731
        if sampling:
            encodings = encodings_of(joined, self.vocabulary.tokens) if "word_ids" in joined else None
            asked = {"word_ids": False, "sequence_ids": False, "offset_mapping": return_offsets_mapping}
            asked["attention_mask"] = mask
            joined = {name: column for name, column in joined.items() if asked.get(name, True)}
        if verbose and max_length is None:
            self._warn_of_long(max(lengths, default=0))
        if return_length:
            joined["length"] = lengths
        if return_overflowing_tokens:
            joined["overflow_to_sample_mapping"] = list(range(len(lengths))) if samples is None else samples
        if return_tensors is not None:
            joined = as_tensors(joined, return_tensors)
        elif single and not return_overflowing_tokens:
            joined = {name: rows[0] for name, rows in joined.items()}
        return BatchEncoding(joined, encodings)

    def _line_break(self, newline: str | None) -> int | None:
        """The id for a run of line breaks, or None."""
        newline = self.newline if newline is None else newline
        if newline == "space":
            return None
        one_of("newline", newline, ("space", "eos"))
        if self.eos_token_id is None:
            raise InputError("newline='eos' needs an end-of-sequence token, but eos_token is None")
        number: int = self.eos_token_id
        return number

    def _split(self, split_special_tokens: bool | None) -> bool:
        return self.split_special_tokens if split_special_tokens is None else split_special_tokens

    def _wanted(self, asked: bool | None, name: str) -> bool:
        """Whether a call returns something."""
        return name in self.model_input_names if asked is None else asked

    def _columns(
        self,
        texts: Sequence[Any],
        sequence: int,
        words: bool,
        offsets: bool,
        sources: bool,
        line_break: int | None,
        split: bool,
    ) -> Columns:
        """The columns of texts, or of lists of words, without special tokens."""
        if words:
            counts = [len(text) for text in texts]
            flat = list(itertools.chain.from_iterable(texts))
            columns = self._columns(flat, sequence, False, offsets, sources, line_break, split)
            if sources:
                numbers = itertools.chain.from_iterable(map(range, counts))
                columns["word_ids"] = [
                    [number] * len(row) for number, row in zip(numbers, columns["input_ids"], strict=True)
                ]
            return {name: batching.regrouped(rows, counts) for name, rows in columns.items()}
        if not offsets:
            return {"input_ids": self.vocabulary.encode_batch(texts, line_break, split)}
        pairs = [self.vocabulary.encode_with_offsets(text, line_break, split) for text in texts]
        rows = [ids for ids, _ in pairs]
        columns = {"input_ids": rows, "offset_mapping": [spans for _, spans in pairs]}
        if sources:
            tokens, found = self.vocabulary.tokens, self.vocabulary.found
            columns["word_ids"] = [words_of([tokens[n] for n in ids], [n in found for n in ids]) for ids in rows]
            columns["sequence_ids"] = [[sequence] * len(ids) for ids in rows]
        return columns

    def _joined(self, first: Columns, second: Columns | None, add_special_tokens: bool) -> Columns:
        """Joins texts or pairs with special tokens, in place, in the lists of the first texts."""
        prefix, middle = self._around(second is not None) if add_special_tokens else ([], [])
        for name, rows in first.items():
            before: list[Any] = prefix
            between: list[Any] = middle
            if name != "input_ids":
                before, between = [SPECIAL[name]] * len(prefix), [SPECIAL[name]] * len(middle)
            for row in rows:
                row[:0] = before
            if second is not None:
                for row, other in zip(rows, second[name], strict=True):
                    row += between
                    row += other
        return first

    def _padding(self, padding: bool | str, max_length: int | None) -> tuple[bool, int | None]:
        """Whether to pad, and to which length; None means that of the longest row."""
        if padding in (False, "do_not_pad"):
            return False, None
        if padding == "max_length" and self._no_limit("padding", max_length):
            return False, None
        if padding not in (True, "longest", "max_length"):
            raise InputError(f"padding is {padding!r}, expected True, False, 'longest' or 'max_length'")
        if self.pad_token_id is None:
            raise InputError(
                "padding needs a pad token, but pad_token is None; set tokenizer.pad_token, e.g. to '<pad>'"
            )
        if padding != "max_length":
            return True, None
        return True, self._max_length(max_length)

    def _max_length(self, max_length: int | None) -> int:
        length = self.model_max_length if max_length is None else max_length
        if not isinstance(length, int | np.integer) or length < 0:
            raise InputError(f"max_length is {length!r}, expected a number of tokens")
        return int(length)

    def _no_limit(self, argument: str, max_length: int | None) -> bool:
        """Whether there is no length to pad or truncate to; warns once."""
        if self._max_length(max_length) < NO_LIMIT:
            return False
        self._warn_once(f"{argument} has no effect without max_length, as the tokenizer's model_max_length is not set")
        return True

    def _warn_of_long(self, length: int) -> None:
        if length > self.model_max_length:
            self._warn_once(
                f"a row has {length} tokens, more than the {self.model_max_length} that the model takes "
                "(model_max_length); set truncation=True, or divide the text"
            )

    def _warn_once(self, message: str) -> None:
        about = message.split()[0]
        if about not in self._warned:
            self._warned.add(about)
            warn(message)

    def _padding_side(self, padding_side: str | None) -> str:
        return one_of("padding_side", self.padding_side if padding_side is None else padding_side, _SIDES)

    def _truncation(
        self, truncation: bool | str, max_length: int | None, stride: int, overflow: bool, added: int
    ) -> Truncation | None:
        """How to truncate so that `added` special tokens fit; None without a limit."""
        strategy = "longest_first" if plain(truncation) is True else one_of("truncation", truncation, STRATEGIES)
        if self._no_limit("truncation", max_length):
            return None
        length = self._max_length(max_length)
        if length < added:
            raise InputError(f"max_length is {length}, expected at least {added}, the number of special tokens")
        if stride < 0:
            raise InputError(f"stride is {stride}, expected a number of tokens")
        side = one_of("truncation_side", self.truncation_side, _SIDES)
        return Truncation(length - added, strategy, side, stride, overflow)
