"""Texts to the inputs of a model: batches, pairs, truncation, padding, tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from xglm_core.errors import InputError
from xglm_core.tokenization import batching
from xglm_core.tokenization.arguments import as_batch, as_lists, one_of
from xglm_core.tokenization.batching import SPECIAL, STRATEGIES, Columns, Truncation
from xglm_core.tokenization.encoding import BatchEncoding, as_tensors
from xglm_core.tokenization.layout import Layout
from xglm_core.tokenization.memory import without_collection
from xglm_core.tokenization.pretrained import NO_LIMIT

_SIDES = ("right", "left")


class Encoder(Layout):
    """The part of a tokenizer that turns texts into ids.

    Attributes:
        padding_side, truncation_side: "right" or "left".
        model_max_length: most tokens of a row.
        newline: "space" or "eos".
    """

    padding_side: str
    truncation_side: str
    model_max_length: int
    newline: str

    @without_collection
    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
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
        newline: str | None = None,
    ) -> BatchEncoding:
        """Turns texts into the inputs of a model.

        Args:
            text: a string, or a list of them; pairs may be given as a list of tuples.
            text_pair: the second text of a pair, or a list of them.
            add_special_tokens: whether to make `</s> X`, and `</s> A </s></s> B` of a pair.
            padding: True or "longest" pads to the length of the longest row, "max_length" to `max_length`.
            truncation: True or "longest_first" shortens rows to `max_length`, of a pair the longer text first;
                "only_first" and "only_second" shorten one text of a pair. None truncates where `max_length` is given
                and not meant for padding.
            max_length: length of a row [tokens]; None for `model_max_length`.
            stride: number of tokens that an overflowing row repeats of its neighbour.
            is_split_into_words: whether each text is a list of words, which are encoded one by one.
            pad_to_multiple_of: what to round the length of padded rows up to.
            padding_side: "right", or "left" as generation needs it; None follows the attribute.
            return_tensors: None for lists; "np", "pt", "tf" or "jax" for tensors [rows, length], where a single
                text is one row.
            return_token_type_ids: whether to return `token_type_ids`, which are 0.
            return_attention_mask: False leaves it out.
            return_overflowing_tokens: whether what truncation drops follows in rows of its own; then
                `overflow_to_sample_mapping` gives the text of each row, and a single text has several rows, too.
            return_special_tokens_mask: whether to return `special_tokens_mask`, 1 for added tokens and padding.
            return_offsets_mapping: whether to return `offset_mapping`, begin and end [characters] of each token in its
                text or word, (0, 0) for added tokens.
            return_length: whether to return `length`, that of each row before padding.
            newline: "space" or "eos"; None follows the attribute.

        Returns:
            `input_ids` and `attention_mask` (1 for tokens, 0 for padding), and what else was asked for.

        Raises:
            InputError: a text is no string or has no UTF-8 encoding, an option is unknown or lacks another one, or
                rows of different lengths are to be a tensor.
            BackendError: the framework that `return_tensors` needs is not installed.
        """
        pad, pad_length = self._padding(padding, max_length)
        firsts, seconds, single = as_batch(text, text_pair, is_split_into_words)
        options = (is_split_into_words, return_offsets_mapping, self._line_break(newline))
        first = self._columns(firsts, *options)
        second = None if seconds is None else self._columns(seconds, *options)
        if truncation is None:
            truncation = max_length is not None and pad_length is None
        samples = None
        if truncation not in (False, "do_not_truncate"):
            added = self.num_special_tokens_to_add(second is not None) if add_special_tokens else 0
            how = self._truncation(truncation, max_length, stride, return_overflowing_tokens, added)
            first, second, samples = batching.truncated(first, second, how)
        for columns in (first, second) if return_special_tokens_mask or return_token_type_ids else ():
            if columns is not None:
                zeros = [[0] * len(row) for row in columns["input_ids"]]
                if return_special_tokens_mask:
                    columns["special_tokens_mask"] = zeros
                if return_token_type_ids:
                    columns["token_type_ids"] = [list(row) for row in zeros]
        joined: dict[str, Any] = self._joined(first, second, add_special_tokens)
        lengths = [len(row) for row in joined["input_ids"]]
        if return_attention_mask is not False:
            joined["attention_mask"] = [[1] * length for length in lengths]
        if pad:
            joined = batching.pad(
                joined,
                length=pad_length,
                multiple_of=pad_to_multiple_of,
                side=self._padding_side(padding_side),
                pad_token_id=self.pad_token_id,
            )
        if return_length:
            joined["length"] = lengths
        if return_overflowing_tokens:
            joined["overflow_to_sample_mapping"] = list(range(len(lengths))) if samples is None else samples
        word_ids = joined.pop("word_ids", None)
        if return_tensors is not None:
            joined = as_tensors(joined, return_tensors)
        elif single and not return_overflowing_tokens:
            joined = {name: rows[0] for name, rows in joined.items()}
        return BatchEncoding(joined, word_ids)

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        """The ids of a text or a pair: a list, or a tensor [1, length]; arguments and errors as of a call."""
        if text_pair is None and not kwargs and isinstance(text, str):
            ids = self.vocabulary.encode(text, self._line_break(None))
            sep = self.sep_token_id
            if sep is not None:
                ids.insert(0, sep)
            return ids
        return self(text, text_pair, **kwargs).input_ids

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, newline: str | None = None
    ) -> list[str]:
        """The tokens of a text, and of a second one; unknown ones appear as the text's own characters.

        Raises:
            InputError: a text is no string or has no UTF-8 encoding.
        """
        line_break = self._line_break(newline)
        first = self.vocabulary.tokenize(text, line_break)
        second = None if pair is None else self.vocabulary.tokenize(pair, line_break)
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
    ) -> BatchEncoding:
        """Pads what a call has returned, e.g. to make a batch of examples that were encoded one by one.

        Args:
            encoded_inputs: `input_ids` and others, of one text or several, or a list of such for one text each.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors: see the call.

        Raises:
            InputError: there are no `input_ids`, or see the call.
        """
        if isinstance(encoded_inputs, list | tuple):
            names = {*itertools.chain.from_iterable(encoded_inputs)}
            if any(names != {*example} for example in encoded_inputs):
                raise InputError(f"encoded_inputs: not all examples have {', '.join(sorted(names))}")
            encoded_inputs = {name: [example[name] for example in encoded_inputs] for name in names}
        columns = {name: as_lists(value) for name, value in encoded_inputs.items()}
        if "input_ids" not in columns:
            raise InputError(f"encoded_inputs has {', '.join(columns) or 'nothing'}, expected input_ids")
        single = not all(isinstance(row, list) for row in columns["input_ids"])
        if single:
            columns = {name: [value] for name, value in columns.items()}
        if return_attention_mask is not False:
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
        if return_tensors is not None:
            return BatchEncoding(as_tensors(columns, return_tensors))
        return BatchEncoding({name: rows[0] for name, rows in columns.items()} if single else columns)

    def _line_break(self, newline: str | None) -> int | None:
        """The id that stands for a run of line breaks, or None."""
        newline = self.newline if newline is None else newline
        if newline == "space":
            return None
        one_of("newline", newline, ("space", "eos"))
        if self.eos_token_id is None:
            raise InputError("newline='eos' needs an end-of-sequence token, but eos_token is None")
        number: int = self.eos_token_id
        return number

    def _columns(self, texts: Sequence[Any], words: bool, offsets: bool, line_break: int | None) -> Columns:
        """What there is to say of texts, or of lists of words, without special tokens."""
        if words:
            counts = [len(text) for text in texts]
            flat = list(itertools.chain.from_iterable(texts))
            columns = self._columns(flat, False, offsets, line_break)
            numbers = itertools.chain.from_iterable(map(range, counts))
            columns["word_ids"] = [
                [number] * len(row) for number, row in zip(numbers, columns["input_ids"], strict=True)
            ]
            return {name: batching.regrouped(rows, counts) for name, rows in columns.items()}
        if offsets:
            pairs = [self.vocabulary.encode_with_offsets(text, line_break) for text in texts]
            return {"input_ids": [ids for ids, _ in pairs], "offset_mapping": [spans for _, spans in pairs]}
        return {"input_ids": self.vocabulary.encode_batch(texts, line_break)}

    def _joined(self, first: Columns, second: Columns | None, add_special_tokens: bool) -> Columns:
        """The rows of texts or pairs, with special tokens around them, in the lists of the first texts."""
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
        """Whether to pad, and to which length; None for that of the longest row."""
        if padding in (False, "do_not_pad"):
            return False, None
        if padding not in (True, "longest", "max_length"):
            raise InputError(f"padding is {padding!r}, expected True, False, 'longest' or 'max_length'")
        if self.pad_token_id is None:
            raise InputError(
                "padding needs a pad token, but pad_token is None; set tokenizer.pad_token, e.g. to '<pad>'"
            )
        if padding != "max_length":
            return True, None
        return True, self._max_length("padding", max_length)

    def _max_length(self, argument: str, max_length: int | None) -> int:
        length = self.model_max_length if max_length is None else max_length
        if not isinstance(length, int) or length < 0:
            raise InputError(f"max_length is {length!r}, expected a number of tokens")
        if length >= NO_LIMIT:
            raise InputError(f"{argument} needs max_length, as the tokenizer's model_max_length is not set")
        return length

    def _padding_side(self, padding_side: str | None) -> str:
        return one_of("padding_side", self.padding_side if padding_side is None else padding_side, _SIDES)

    def _truncation(
        self, truncation: bool | str, max_length: int | None, stride: int, overflow: bool, added: int
    ) -> Truncation:
        """How to truncate, so that `added` special tokens have room."""
        strategy = "longest_first" if truncation is True else one_of("truncation", truncation, STRATEGIES)
        length = self._max_length("truncation", max_length)
        if length < added:
            raise InputError(f"max_length is {length}, expected at least {added}, the number of special tokens")
        if stride < 0:
            raise InputError(f"stride is {stride}, expected a number of tokens")
        side = one_of("truncation_side", self.truncation_side, _SIDES)
        return Truncation(length - added, strategy, side, stride, overflow)
