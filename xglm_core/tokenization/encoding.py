"""Token ids on their way out of a tokenizer and back into it: as lists, or as the tensors of any framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xglm_core.backends import require_frameworks
from xglm_core.errors import InputError


class BatchEncoding(dict[str, Any]):
    """The inputs of a model, for `model(**inputs)`; `inputs["input_ids"]` is `inputs.input_ids`, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this BatchEncoding has no {name!r}, only {', '.join(self)}") from None


def encode_batch(
    rows: Sequence[list[int]], *, pad_token_id: int | None, padding_side: str, return_tensors: str | None
) -> BatchEncoding:
    """Collects rows of token ids into model inputs.

    Args:
        rows: token ids, one list per text.
        pad_token_id: id to pad the rows with to the length of the longest; None leaves them as they are.
        padding_side: "right" or "left".
        return_tensors: None for lists; "np", "pt", "tf" or "jax" for integer tensors [rows, length], int64 in numpy and
            PyTorch, int32 in TensorFlow and JAX.

    Returns:
        `input_ids`, and `attention_mask` with 1 for tokens and 0 for padding.

    Raises:
        InputError: `padding_side` or `return_tensors` is unknown, or the rows differ in length and are to be tensors.
        BackendError: the framework is not installed.
    """
    if padding_side not in ("right", "left"):
        raise InputError(f"padding_side is {padding_side!r}, expected 'right' or 'left'")
    ids, masks = [list(row) for row in rows], [[1] * len(row) for row in rows]
    if pad_token_id is not None:
        longest = max(map(len, rows), default=0)
        ids = [_padded(row, longest, pad_token_id, padding_side) for row in ids]
        masks = [_padded(row, longest, 0, padding_side) for row in masks]
    if return_tensors is None:
        return BatchEncoding(input_ids=ids, attention_mask=masks)
    to_tensor = _tensor_maker(return_tensors)
    lengths = sorted({len(row) for row in ids})
    if len(lengths) > 1:
        raise InputError(
            f"the texts have {lengths[0]} to {lengths[-1]} tokens, so they fit no tensor; use padding=True"
        )
    # Reshaping keeps the two axes where there is no row or no token.
    shape = (len(ids), *lengths) if lengths else (0, 0)
    arrays = {"input_ids": ids, "attention_mask": masks}
    return BatchEncoding({name: to_tensor(np.array(x, np.int64).reshape(shape)) for name, x in arrays.items()})


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


def _padded(row: list[int], length: int, value: int, side: str) -> list[int]:
    padding = [value] * (length - len(row))
    return row + padding if side == "right" else padding + row


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
