"""Token ids on their way out of a tokenizer and back into it: as lists, or as the tensors of any framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from xglm_core.backends import require_frameworks
from xglm_core.errors import InputError


class BatchEncoding(dict[str, Any]):
    """The inputs of a model, for `model(**inputs)`; `inputs["input_ids"]` is `inputs.input_ids`, too.

    Args:
        values: the inputs.
        word_ids: for each row, the word that each token belongs to, None for special tokens.
    """

    def __init__(self, values: dict[str, Any], word_ids: list[list[int | None]] | None = None) -> None:
        super().__init__(values)
        self._word_ids = word_ids

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this BatchEncoding has no {name!r}, only {', '.join(self)}") from None

    def __reduce__(self) -> Any:
        return BatchEncoding, (dict(self), self._word_ids)

    @property
    def data(self) -> dict[str, Any]:
        """The inputs as a plain dictionary."""
        return dict(self)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word that each token of a row belongs to, None for special tokens and padding.

        Raises:
            InputError: the text was not split into words.
        """
        if self._word_ids is None:
            raise InputError("word_ids: the text was not split into words; pass words and is_split_into_words=True")
        return self._word_ids[batch_index]

    def to(self, device: Any) -> Self:
        """Moves PyTorch's tensors to a device, in place; returns itself.

        Raises:
            InputError: the inputs are not PyTorch's tensors.
        """
        for name, value in self.items():
            if not hasattr(value, "to"):
                raise InputError(f"{name} is a {type(value).__name__}, which moves nowhere; use return_tensors='pt'")
            self[name] = value.to(device)
        return self


def as_tensors(columns: dict[str, list[Any]], return_tensors: str) -> dict[str, Any]:
    """Turns rows of integers into tensors.

    Args:
        columns: under each name, rows of equal length, or one integer per row.
        return_tensors: "np", "pt", "tf" or "jax" for tensors [rows, length, ...], int64 in numpy and PyTorch, int32 in
            TensorFlow and JAX.

    Raises:
        InputError: `return_tensors` is unknown, or the rows differ in length.
        BackendError: the framework is not installed.
    """
    to_tensor = _tensor_maker(return_tensors)
    lengths = sorted({len(row) for row in columns["input_ids"]})
    if len(lengths) > 1:
        raise InputError(
            f"the texts have {lengths[0]} to {lengths[-1]} tokens, so they fit no tensor; use padding=True"
        )
    arrays = {name: np.array(rows, np.int64) for name, rows in columns.items()}
    for name, rows in columns.items():
        if not rows:  # Keeps the two axes where there is no row.
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
        # Tensors on a GPU are no arrays, but they all have `tolist`.
        array = np.asarray(ids.tolist() if hasattr(ids, "tolist") else ids)
    except ValueError:  # Rows of different lengths.
        array = np.empty((0, 0))
    if array.ndim > 1:
        raise InputError("the ids are a batch, expected one sequence [length]; use batch_decode")
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocab_size):
        values = array.reshape(-1).tolist()
        bad = next(value for value in values if type(value) is not int or not 0 <= value < vocab_size)
        raise InputError(f"{bad!r} is no token id, expected integers from 0 to {vocab_size - 1}")
    return array.astype(np.int64)


def _tensor_maker(name: str) -> Callable[[np.ndarray], Any]:
    """The function that makes a tensor from an array; imports the framework that `name` asks for, and no other."""
    if name == "np":
        return lambda array: array
    if name == "pt":
        require_frameworks("torch")
        torch: Any = importlib.import_module("torch")
        return lambda array: torch.from_numpy(array)
    if name == "tf":
        require_frameworks("tf")
        tf: Any = importlib.import_module("tensorflow")
        return lambda array: tf.constant(array, dtype=tf.int32)
    if name == "jax":
        require_frameworks("flax")
        jnp: Any = importlib.import_module("jax.numpy")
        return lambda array: jnp.asarray(array, dtype=jnp.int32)
    raise InputError(f"return_tensors is {name!r}, expected None, 'np', 'pt', 'tf' or 'jax'")
