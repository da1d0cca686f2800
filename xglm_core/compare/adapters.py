"""The models of all backends behind one small numpy interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.backends import BACKENDS, load_backend

_ONE_BY_ONE = 8  # The cached pass reads so many of the last positions one by one; eager frameworks are slow at that.


class BackendModel:
    """A backend's causal language model in float32, called with numpy arrays.

    Args:
        backend: "torch", "tf" or "flax".
        folder: the checkpoint.
        weights: the format to read; see `open_checkpoint`.

    Raises:
        XGLMError: the backend is not installed, or the checkpoint cannot be loaded.
    """

    def __init__(self, backend: str, folder: str | Path, weights: str | None = None) -> None:
        model_class = getattr(load_backend(backend), BACKENDS[backend].causal_lm)
        self._model = model_class.from_pretrained(folder, dtype="float32", weights=weights)
        self._tensor, self._inference = _CONVERSIONS[backend]()

    def full(self, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Reads the whole input at once.

        Args:
            input_ids: int64 [batch, length].
            attention_mask: 1 for tokens, 0 for padding, int64 [batch, length]; None passes none.

        Returns:
            The logits [batch, length, vocab_size] and num_layers + 1 hidden states [batch, length, d_model], float32.
        """
        outputs = self._call(input_ids, attention_mask, use_cache=False, output_hidden_states=True)
        return np.asarray(outputs.logits), [np.asarray(state) for state in outputs.hidden_states]

    def cached(self, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        """Reads the last positions token by token, after all others at once; returns the logits of all."""
        length = input_ids.shape[1]
        first = max(1, length - _ONE_BY_ONE)
        return self.chunked(input_ids, attention_mask, [first] + [1] * (length - first))

    def chunked(self, input_ids: np.ndarray, attention_mask: np.ndarray | None, chunks: Sequence[int]) -> np.ndarray:
        """Reads the input in pieces of these lengths, each with the cache of those before; returns all logits."""
        logits, cache, begin = [], None, 0
        for length in chunks:
            end = begin + length
            outputs = self._call(
                input_ids[:, begin:end],
                None if attention_mask is None else attention_mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(np.asarray(outputs.logits))
            cache, begin = outputs.past_key_values, end
        return np.concatenate(logits, axis=1)

    def generate(self, input_ids: np.ndarray, attention_mask: np.ndarray | None, new_tokens: int) -> np.ndarray:
        """Continues each row greedily, until it ends or has `new_tokens` more; returns ids [batch, length + new]."""
        mask = None if attention_mask is None else self._tensor(attention_mask)
        return np.asarray(self._model.generate(self._tensor(input_ids), attention_mask=mask, max_new_tokens=new_tokens))

    def _call(self, input_ids: np.ndarray, attention_mask: np.ndarray | None, **options: Any) -> Any:
        mask = None if attention_mask is None else self._tensor(attention_mask)
        with self._inference():
            return self._model(input_ids=self._tensor(input_ids), attention_mask=mask, **options)


# For each backend: a function that makes a tensor from an array, and a context without gradients.
_Conversions = tuple[Callable[[np.ndarray], Any], Callable[[], AbstractContextManager[Any]]]


def _torch() -> _Conversions:
    import torch

    return torch.from_numpy, torch.inference_mode


def _tf() -> _Conversions:
    import tensorflow

    return tensorflow.convert_to_tensor, contextlib.nullcontext


def _flax() -> _Conversions:
    import jax.numpy

    return jax.numpy.asarray, contextlib.nullcontext


_CONVERSIONS = {"torch": _torch, "tf": _tf, "flax": _flax}
