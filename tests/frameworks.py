"""Each backend under one thin, test-side view: numpy in, numpy out."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.backends import BACKENDS

_DECODERS = {"torch": "XGLMModel", "tf": "TFXGLMModel", "flax": "FlaxXGLMModel"}


def backends_under_test() -> list[str]:
    """The backends named in XGLM_TEST_BACKENDS (comma-separated; empty for none); all of them if it is not set."""
    names = os.environ.get("XGLM_TEST_BACKENDS", ",".join(BACKENDS)).split(",")
    return [name for name in names if name]


@dataclass(frozen=True)
class Framework:
    """One backend."""

    name: str

    @property
    def package(self) -> Any:
        return importlib.import_module(BACKENDS[self.name].package)

    @property
    def causal_lm(self) -> Any:
        return getattr(self.package, BACKENDS[self.name].causal_lm)

    @property
    def decoder(self) -> Any:
        return getattr(self.package, _DECODERS[self.name])

    def tensor(self, array: Any) -> Any:
        """The framework's tensor."""
        return _TENSOR[self.name](np.asarray(array))

    def numpy(self, tensor: Any) -> np.ndarray:
        """A numpy array; bfloat16 becomes float32."""
        if self.name == "torch":
            tensor = tensor.detach().float() if tensor.is_floating_point() else tensor
        array = np.asarray(tensor)
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array

    def call(self, model: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Calls a model with numpy ids and mask (and position_ids)."""
        for name, value in (("attention_mask", attention_mask), ("position_ids", kwargs.pop("position_ids", None))):
            if value is not None:
                kwargs[name] = self.tensor(value)
        return model(input_ids=self.tensor(input_ids), **kwargs)

    def logits(self, model: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> np.ndarray:
        return self.numpy(self.call(model, input_ids, attention_mask, **kwargs).logits)

    def generate(self, model: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> np.ndarray:
        mask = None if attention_mask is None else self.tensor(attention_mask)
        return self.numpy(model.generate(self.tensor(input_ids), attention_mask=mask, **kwargs))


def _torch_tensor(array: np.ndarray) -> Any:
    return importlib.import_module("torch").from_numpy(array.copy())


def _tf_tensor(array: np.ndarray) -> Any:
    return importlib.import_module("tensorflow").constant(array)


def _jax_tensor(array: np.ndarray) -> Any:
    if array.dtype == np.int64:  # What `jnp.asarray` does anyway, said aloud.
        array = array.astype(np.int32)
    return importlib.import_module("jax.numpy").asarray(array)


_TENSOR = {"torch": _torch_tensor, "tf": _tf_tensor, "flax": _jax_tensor}
