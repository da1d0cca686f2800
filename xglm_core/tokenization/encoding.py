"""The results of a tokenizer: token ids as lists, or as tensors of any framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from xglm_core.backends import require_frameworks
from xglm_core.errors import InputError
from xglm_core.tokenization.alignment import CharSpan, Encoding, TokenSpan


class BatchEncoding(dict[str, Any]):
    """The inputs of a model, for `model(**inputs)`; `inputs["input_ids"]` is `inputs.input_ids`, too.

    `inputs[0]` is the first row as an `Encoding`, `inputs[:2]` has the first two rows of each input. Encodings are made
    on first use, so calls that do not need them do not pay for them. The methods below take a row and an index in it,
    or only an index in the first row.

    Args:
        values: the inputs.
        encodings: the rows, or a function that makes them.
        tensor_type: see `convert_to_tensors`.
    """

    def __init__(
        self,
        values: dict[str, Any],
        encodings: list[Encoding] | Callable[[], list[Encoding]] | None = None,
        tensor_type: str | None = None,
    ) -> None:
        super().__init__(values)
        self._encodings = encodings
        if tensor_type is not None:
            self.convert_to_tensors(tensor_type)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.items()}
        return self._row(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this BatchEncoding has no {name!r}, only {', '.join(self)}") from None

    def __reduce__(self) -> Any:
        return BatchEncoding, (dict(self), self._encodings if isinstance(self._encodings, list) else None)

    @property
    def data(self) -> dict[str, Any]:
        """The inputs as a plain dictionary."""
        return dict(self)

    @property
    def encodings(self) -> list[Encoding] | None:
        """The rows as `Encoding`; None if unknown."""
        if callable(self._encodings):
            self._encodings = self._encodings()
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether `encodings` are known; both tokenizers make them."""
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """The number of texts in a row, 1 or 2; None if unknown."""
        return self.encodings[0].n_sequences if self.encodings else None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row."""
        return self._row(batch_index).tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row, the index of its text in a pair; None for added tokens and padding."""
        return self._row(batch_index).sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row, the index of its word; None for added tokens and padding.

        Words are those of `is_split_into_words`, or are separated by spaces and added tokens.
        """
        return self._row(batch_index).word_ids

    words = word_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """See `Encoding`."""
        row, place = self._place(batch_or_token_index, token_index)
        return row.token_to_sequence(place)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """See `Encoding`."""
        row, place = self._place(batch_or_token_index, token_index)
        return row.token_to_word(place)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """See `Encoding`."""
        row, place = self._place(batch_or_token_index, token_index)
        return row.token_to_chars(place)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """See `Encoding`."""
        row, place = self._place(batch_or_char_index, char_index)
        return row.char_to_token(place, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """See `Encoding`."""
        row, place = self._place(batch_or_char_index, char_index)
        return row.char_to_word(place, sequence_index)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """See `Encoding`."""
        row, place = self._place(batch_or_word_index, word_index)
        return row.word_to_tokens(place, sequence_index)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """See `Encoding`."""
        row, place = self._place(batch_or_word_index, word_index)
        return row.word_to_chars(place, sequence_index)

    def _place(self, row: int, place: int | None) -> tuple[Encoding, int]:
        """A row and an index in it; a single argument is an index in the first row."""
        return (self._row(0), row) if place is None else (self._row(row), place)

    def _row(self, number: int) -> Encoding:
        if self.encodings is None:
            raise InputError(
                "tokens and words are known of what a tokenizer has returned for texts, not after pad or pickling"
            )
        return self.encodings[number]

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> Self:
        """Converts lists to tensors, in place; returns itself.

        Args:
            tensor_type: "np", "pt", "tf" or "jax"; None leaves the lists.
            prepend_batch_axis: whether the lists are a single row.

        Raises:
            InputError: see `return_tensors` of a call.
        """
        if tensor_type is not None:
            columns = {name: [value] if prepend_batch_axis else value for name, value in self.items()}
            self.update(as_tensors(columns, tensor_type))
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """Moves PyTorch's tensors to a device, in place; returns itself.

        Raises:
            InputError: the inputs are not PyTorch's tensors.
        """
        for name, value in self.items():
            if not hasattr(value, "to"):
                raise InputError(f"{name} is a {type(value).__name__}, which moves nowhere; use return_tensors='pt'")
            self[name] = value.to(device, non_blocking=non_blocking)
        return self


def as_tensors(columns: dict[str, list[Any]], return_tensors: str) -> dict[str, Any]:
    """Converts rows of integers to tensors.

    Args:
        columns: under each name, rows of equal length, or one integer per row.
        return_tensors: "np", "pt", "tf" or "jax" for tensors [rows, length, ...], int64 in numpy and PyTorch, int32 in
            TensorFlow and JAX.

    Raises:
        InputError: `return_tensors` is unknown, or the rows differ in length.
        BackendError: the framework is not installed.
    """
    to_tensor = _tensor_maker(return_tensors)
    for name, rows in columns.items():
        lengths = sorted({len(row) for row in rows if isinstance(row, list)})
        if len(lengths) > 1:
            what = "the texts have" if name == "input_ids" else f"{name} has rows of"
            raise InputError(f"{what} {lengths[0]} to {lengths[-1]} tokens, so they fit no tensor; use padding=True")
    arrays = {name: _as_array(name, rows) for name, rows in columns.items()}
    for name, rows in columns.items():
        if not rows:  # Keeps two axes without rows.
            arrays[name] = arrays[name].reshape(0, 0)
        elif isinstance(rows[0], list) and not rows[0]:
            arrays[name] = arrays[name].reshape(len(rows), 0, *([2] if name == "offset_mapping" else []))
    return {name: to_tensor(array) for name, array in arrays.items()}


def as_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """An id, or a sequence of ids in any form, as int64 [] or [length].

    Raises:
        InputError: not integers of the vocabulary, or a batch.
    """
    try:
        # Tensors on a GPU are not arrays, but all have `tolist`.
        array = np.asarray(ids.tolist() if hasattr(ids, "tolist") else ids)
    except ValueError:  # Rows of different lengths.
        array = np.empty((0, 0))
    if array.ndim > 1:
        raise InputError("the ids are a batch, expected one sequence [length]; use batch_decode")
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocab_size):
        values = array.reshape(-1).tolist()
        bad = next(value for value in values if type(value) is not int or not 0 <= value < vocab_size)
        raise InputError(f"{bad!r} is not a token id, expected integers from 0 to {vocab_size - 1}")
    return array.astype(np.int64)


def _as_array(name: str, rows: list[Any]) -> np.ndarray:
    """Converts integers to int64, other numbers to float32."""
    try:
        array = np.array(rows)
        return array.astype(np.float32 if array.dtype.kind == "f" and array.size else np.int64)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {rows!r:.80}, which is not a tensor of numbers") from None


def _tensor_maker(name: str) -> Callable[[np.ndarray], Any]:
    """A function that makes a tensor from an array; imports only the framework that is needed."""
    if name == "np":
        return lambda array: array
    if name == "pt":
        require_frameworks("torch")
        torch: Any = importlib.import_module("torch")
        return lambda array: torch.from_numpy(array)
    if name == "tf":
        require_frameworks("tf")
        tf: Any = importlib.import_module("tensorflow")
        return lambda array: tf.constant(array, dtype=tf.float32 if array.dtype.kind == "f" else tf.int32)
    if name == "jax":
        require_frameworks("flax")
        jnp: Any = importlib.import_module("jax.numpy")
        return lambda array: jnp.asarray(array, dtype=jnp.float32 if array.dtype.kind == "f" else jnp.int32)
    raise InputError(f"return_tensors is {name!r}, expected None, 'np', 'pt', 'tf' or 'jax'")


def tensor_type(value: Any) -> str | None:
    """The value of `return_tensors` for the type of a tensor, or of the first element of a list; None for lists."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    if not getattr(value, "ndim", 0):
        return None
    kinds = {"numpy": "np", "torch": "pt", "tensorflow": "tf", "jaxlib": "jax", "jax": "jax"}
    return kinds.get(type(value).__module__.partition(".")[0])
