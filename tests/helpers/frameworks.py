"""Each backend under one thin, test-side view: numpy in, numpy out."""

from __future__ import annotations

import functools
import importlib
import math
import operator
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from xglm_core import XGLMConfig
from xglm_core.backends import BACKENDS
from xglm_core.weight_names import weight_specs

_DECODERS = {"torch": "XGLMModel", "tf": "TFXGLMModel", "flax": "FlaxXGLMModel"}


def backends_under_test() -> list[str]:
    """The backends named in XGLM_TEST_BACKENDS (comma-separated; empty for none); all of them if it is not set."""
    names = os.environ.get("XGLM_TEST_BACKENDS", ",".join(BACKENDS)).split(",")
    return [name for name in names if name]


def needs(name: str) -> None:
    """Skips a test, or a module that calls this when it is imported, where a backend is not under test."""
    if name not in backends_under_test():
        pytest.skip(f"XGLM_TEST_BACKENDS leaves {name} out", allow_module_level=True)


needs_a_backend = pytest.mark.skipif(not backends_under_test(), reason="XGLM_TEST_BACKENDS leaves all backends out")


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

    def tensors(self, value: Any) -> Any:
        """Numpy arrays in (tuples of) arguments as tensors; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(self.tensors(item) for item in value)
        return self.tensor(value) if isinstance(value, np.ndarray) else value

    def call(self, model: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Calls a model with numpy arrays."""
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        return model(**{name: self.tensors(value) for name, value in arguments.items() if value is not None})

    def train_call(self, model: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
        """`call` in training mode, where chance has a part."""
        return _TRAIN_CALL[self.name](self, model, seed, *args, **kwargs)

    def fresh(self, config: XGLMConfig, seed: int = 0) -> Any:
        """A causal language model with random weights, the same for the same seed."""
        return _FRESH[self.name](self.causal_lm, config, seed)

    def embedded(self, model: Any, input_ids: np.ndarray) -> np.ndarray:
        """What `inputs_embeds` takes for these ids, as an array of its own."""
        embeddings = model.get_input_embeddings()
        if self.name == "flax":  # A matrix, as parameters are no part of a module.
            return np.asarray(embeddings)[input_ids] * np.float32(embed_scale(model.config))
        return self.numpy(embeddings(self.tensor(input_ids))).copy()

    def embedding_matrix(self, model: Any) -> np.ndarray:
        """The table [vocab_size, d_model]."""
        embeddings = model.get_input_embeddings()
        attribute = {"torch": "weight", "tf": "embeddings"}.get(self.name)
        return self.numpy(embeddings if attribute is None else getattr(embeddings, attribute))

    def loss_and_gradients(self, model: Any, **arguments: Any) -> tuple[float, dict[str, np.ndarray]]:
        """The loss and its gradients by canonical name, in canonical shape."""
        arguments = {name: self.tensors(value) for name, value in arguments.items() if value is not None}
        loss, gradients = _GRADIENTS[self.name](model, arguments)
        specs = weight_specs(model.config, with_head=not model.config.tie_word_embeddings)
        transposed = self.name != "torch"
        return float(loss), {
            spec.name: gradient.T if spec.transposed and transposed else gradient
            for spec in specs
            for gradient in [np.asarray(gradients(spec))]
        }

    def logits(self, model: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> np.ndarray:
        return self.numpy(self.call(model, input_ids, attention_mask, **kwargs).logits)

    def generate(self, model: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> np.ndarray:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        return self.numpy(
            model.generate(**{name: self.tensors(value) for name, value in arguments.items() if value is not None})
        )

    def engine(self, model: Any) -> Any:
        """A fresh engine of `generate`."""
        return _ENGINE[self.name](model)


def _torch_engine(model: Any) -> Any:
    return importlib.import_module("xglm_torch.generation").TorchEngine(model)


def _tf_engine(model: Any) -> Any:
    return importlib.import_module("xglm_tf.generation").TFEngine(model.compiled_engine)


def _flax_engine(model: Any) -> Any:
    return importlib.import_module("xglm_flax.generation").FlaxEngine(model.compiled_engine, model.params)


def _torch_tensor(array: np.ndarray) -> Any:
    return importlib.import_module("torch").from_numpy(array.copy())


def _tf_tensor(array: np.ndarray) -> Any:
    return importlib.import_module("tensorflow").constant(array)


def _jax_tensor(array: np.ndarray) -> Any:
    if array.dtype == np.int64:  # What `jnp.asarray` does anyway, said aloud.
        array = array.astype(np.int32)
    return importlib.import_module("jax.numpy").asarray(array)


def _torch_train_call(fw: Framework, model: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
    importlib.import_module("torch").manual_seed(seed)
    model.train()
    try:
        return fw.call(model, *args, **kwargs)
    finally:
        model.eval()


def _tf_train_call(fw: Framework, model: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
    # Keras' generators keep their state from their making on, whatever seed is set later.
    for index, variable in enumerate(v for v in model.variables if v.name == "seed_generator_state"):
        variable.assign([1000 * seed + index, 0])
    return fw.call(model, *args, training=True, **kwargs)


def _flax_train_call(fw: Framework, model: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
    key = importlib.import_module("jax").random.key(seed)
    return fw.call(model, *args, train=True, dropout_rng=key, **kwargs)


def _torch_fresh(kind: Any, config: XGLMConfig, seed: int) -> Any:
    importlib.import_module("torch").manual_seed(seed)
    return kind(config).eval()


def _tf_fresh(kind: Any, config: XGLMConfig, seed: int) -> Any:
    importlib.import_module("keras").utils.set_random_seed(seed)
    return kind(config)


def _flax_fresh(kind: Any, config: XGLMConfig, seed: int) -> Any:
    return kind(config, seed=seed)


def _torch_gradients(model: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), lambda spec: model.get_parameter(spec.name).grad


def _tf_gradients(model: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    tf = importlib.import_module("tensorflow")
    with tf.GradientTape() as tape:
        loss = model(**arguments).loss
    gradients = tape.gradient(loss, model.trainable_variables)
    by_path = {v.path.partition("/")[2]: g for v, g in zip(model.trainable_variables, gradients, strict=True)}
    return loss, lambda spec: tf.convert_to_tensor(by_path[spec.keras])


def _flax_gradients(model: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    jax = importlib.import_module("jax")
    loss, gradients = jax.value_and_grad(lambda params: model(**arguments, params=params).loss)(model.params)
    return loss, lambda spec: functools.reduce(operator.getitem, spec.flax, gradients)


def embed_scale(config: XGLMConfig) -> float:
    """The factor of the token embeddings."""
    return math.sqrt(config.d_model) if config.scale_embedding else 1.0


_TRAIN_CALL = {"torch": _torch_train_call, "tf": _tf_train_call, "flax": _flax_train_call}
_FRESH = {"torch": _torch_fresh, "tf": _tf_fresh, "flax": _flax_fresh}
_GRADIENTS = {"torch": _torch_gradients, "tf": _tf_gradients, "flax": _flax_gradients}
_ENGINE = {"torch": _torch_engine, "tf": _tf_engine, "flax": _flax_engine}
_TENSOR = {"torch": _torch_tensor, "tf": _tf_tensor, "flax": _jax_tensor}
