"""What both model classes share: initialisation, loading, saving."""

from __future__ import annotations

import json
import math
import os
import types
import warnings
from collections.abc import Iterable
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from xglm_core.checkpoint.dtypes import FloatType, float_type
from xglm_core.checkpoint.loading import Loading, LoadPlan, plan_loading
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.keywords import writes
from xglm_core.resizing import check_embeddings, take_sizes
from xglm_core.surface import DUMMY_IDS, ModelSurface
from xglm_core.weight_names import EMBEDDING
from xglm_tf.exporting import Exporting
from xglm_tf.keras_steps import KerasSteps
from xglm_tf.weights import (
    Initializer,
    all_layers,
    load_weights,
    read_weight,
    set_initializer,
    weights_dtype,
    write_weight,
)

_QUANTIZATION = ("int8", "int4", "float8")  # What Keras offers without examples to calibrate with.


class TFXGLMPreTrainedModel(ModelSurface, KerasSteps, Exporting, keras.Model):
    """Base of the model classes.

    Attributes:
        config: the architecture.
    """

    framework = "tf"
    supports_xla_generation = False  # By a `tf.function` around it: it compiles by itself.

    def __init__(self, config: XGLMConfig, *, dtype: Any = None, **kwargs: Any) -> None:
        config.validate()
        super().__init__(dtype=dtype, **kwargs)
        if (mode := self.dtype_policy.quantization_mode) is not None:
            raise InputError(
                f"dtype is {self.dtype_policy.name!r}, in which no weights are made or loaded; expected a type of "
                f"floats, and quantize({mode!r}) afterwards"
            )
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        weights: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder that holds `config.json` and the weights, in any of the published
                formats; or the id of a repository of the Hugging Face Hub.
            dtype: type of parameters and computation, by name or as a TensorFlow type; "auto" keeps the file's. Or a
                Keras policy, for example "mixed_bfloat16". None follows Keras' global policy: float32 unless another
                was set.
            weights: the format to read if there are several; see `open_checkpoint`.
            options: which revision of a repository, and how it is downloaded: see `HubOptions`; a whole `config`, or
                keys of the configuration whose value is to be another one; and what transformers takes: see
                `xglm_core.keywords`.

        Returns:
            The model.

        Raises:
            CheckpointError: there is no checkpoint, it cannot be downloaded, or it does not fit the model.
            ConfigError: its configuration is impossible.
            InputError: an option is unknown, or not offered.
        """
        loading = Loading.of(options, dtype=dtype, weights=weights)
        dtype = keras.config.dtype_policy() if loading.dtype is None else loading.dtype
        is_policy = isinstance(dtype, keras.DTypePolicy) or (isinstance(dtype, str) and dtype.startswith("mixed_"))
        policy = keras.dtype_policies.get(dtype) if is_policy else None
        held = dtype if policy is None else policy.variable_dtype
        checkpoint = loading.open(pretrained_model_name_or_path)
        plan = plan_loading(checkpoint, with_head=cls.has_head, dtype=held, int8=False)
        model = cls(plan.config, dtype=policy or plan.dtype.name, plan=plan)
        model._follow_checkpoint(plan, pretrained_model_name_or_path)
        return loading.with_info(model)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        dtype: Any = None,
        **options: Any,
    ) -> None:
        """Writes `config.json` and safetensors in the published layout.

        Args:
            save_directory: the folder, created if it is missing; an older checkpoint there is replaced once the new one
                is complete.
            max_shard_size: most bytes in one file, as a number or e.g. "500MB".
            dtype: type to store; None keeps the parameters'.
            options: what transformers takes: see `xglm_core.keywords`. With `is_main_process=False` nothing is written.

        Raises:
            InputError: `dtype` or `max_shard_size` is unknown, the model is quantized, or an option is unknown or not
                offered.
        """
        if not writes(options):
            return
        stored = weights_dtype(self) if dtype is None else float_type(dtype)
        self._check_not_quantized("save_pretrained")
        specs = self._specs()
        self._save(save_directory, stored, lambda name: read_weight(self, specs[name], stored), max_shard_size)

    def get_input_embeddings(self) -> keras.layers.Embedding:
        """The token embedding. Called with ids it gives what `inputs_embeds` takes: scaled embeddings."""
        return self.model.embed_tokens

    def set_input_embeddings(self, new_embeddings: Any) -> None:
        """Takes over the values of another embedding; a tied head follows.

        Differs: the values are copied, where `XGLMPreTrainedModel.set_input_embeddings` of PyTorch shares them: Keras
        variables belong to one model.

        Args:
            new_embeddings: a layer with `embeddings`, or a `Dense` with a transposed `kernel`, or a matrix
                [vocab_size, d_model].

        Raises:
            InputError: the matrix has another shape.
        """
        self.get_input_embeddings().embeddings.assign(embedding_matrix(new_embeddings, self.config))
        self.tie_weights()

    def _read_weight(self, name: str) -> tuple[np.ndarray, FloatType]:
        dtype = weights_dtype(self)
        return read_weight(self, self._specs()[name], dtype), dtype

    def _reshape(self, config: XGLMConfig, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """See `ModelSurface._reshape`."""
        if config.pruned_heads != self.config.pruned_heads:
            self._check_not_quantized("prune_heads")
            if self.has_lora:
                raise InputError(
                    "there are adapters, expected none: prune heads before enable_lora, or save and load first"
                )
        specs = self._specs()
        for name, value in weights:
            write_weight(self, specs[name], value)
        take_sizes(self.config, config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn.heads = config.kept_heads(index)
        self.forget_compiled()

    def quantize(self, mode: str | None = None, config: Any = None, **options: Any) -> None:
        """Has the projections of the blocks hold their weights in int8 or int4, or compute in float8.

        Embedding and head stay as they are. Keras' `save` keeps such a model; `save_pretrained` refuses it.

        Args:
            mode: "int8", "int4" or "float8".
            config: how, e.g. `keras.quantizers.Int4QuantizationConfig(block_size=64)`, in place of `mode`.
            options: see `keras.Model.quantize`.

        Raises:
            InputError: it is another mode.
        """
        if mode not in _QUANTIZATION:
            raise InputError(f"quantization is {mode!r}, expected one of {', '.join(_QUANTIZATION)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")  # Nor need it.
            super().quantize(mode, config=config, **options)
        self.forget_compiled()

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints embedding, blocks, norm and head, with shapes and numbers of parameters; see `keras.Model.summary`."""
        names = ("name", "compiled", "optimizer", "trainable_weights", "non_trainable_weights")
        parts = [self.model.embed_tokens, *self.model.layers, self.model.layer_norm]
        own_head = [] if self.get_output_embeddings() in (None, self.get_input_embeddings()) else [self.lm_head]
        # Keras shows the layers of what it is given, and those of a model are one, of which it knows no shape.
        shown = types.SimpleNamespace(layers=[*parts, *own_head], **{name: getattr(self, name, None) for name in names})
        keras.Model.summary(shown, *args, **kwargs)

    @property
    def has_lora(self) -> bool:
        """Whether there are adapters."""
        return any(getattr(layer, "lora_enabled", False) for layer in all_layers(self))

    @property
    def dummy_inputs(self) -> dict[str, tf.Tensor]:
        """Ids that any model can read, int32 [3, 5]."""
        return {"input_ids": tf.constant(DUMMY_IDS)}

    def get_decoder(self) -> keras.layers.Layer:
        """The bare decoder: a layer, called as `TFXGLMModel` is."""
        return self.model

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; a tied head counts once."""
        weights = self.trainable_weights if only_trainable else self.weights
        table = self.get_input_embeddings().embeddings
        return sum(math.prod(weight.shape) for weight in weights if not (exclude_embeddings and weight is table))

    def get_memory_footprint(self) -> int:
        """Bytes of the parameters, a tied head once."""
        return sum(math.prod(weight.shape) * tf.as_dtype(weight.dtype).size for weight in self.weights)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same architecture of, as plain Python objects.

        Raises:
            ConfigError: the activation is a callable, which cannot be saved.
        """
        config = {**super().get_config(), "config": json.loads(self.config.to_json_string())}
        policies = {
            layer.path.removeprefix(f"{self.path}/"): keras.saving.serialize_keras_object(
                {"policy": layer.dtype_policy, "quantization": getattr(layer, "quantization_config", None)}
            )
            for layer in all_layers(self)
            if layer.path is not None and layer.dtype_policy != self.dtype_policy
        }
        return {**config, "policies": policies} if policies else config

    @classmethod
    def from_config(cls, config: XGLMConfig | dict[str, Any], custom_objects: Any = None, **kwargs: Any) -> Self:
        """A model with random weights.

        Args:
            config: what `get_config` has returned; or the architecture alone, as an `XGLMConfig` or its dictionary.
            custom_objects: unused.
            kwargs: arguments of the constructor, beside an architecture.
        """
        if isinstance(config, XGLMConfig):
            return cls(config, **kwargs)
        if "config" not in config:
            return cls(XGLMConfig.from_dict(config), **kwargs)
        options = {**config, **kwargs, "config": XGLMConfig.from_dict(config["config"])}
        policies = options.pop("policies", {})
        model = cls(**options)
        for layer in all_layers(model):
            saved = policies.get((layer.path or "").removeprefix(f"{model.path}/"))
            if saved is not None:
                _set_policy(layer, **keras.saving.deserialize_keras_object(saved))
        return model

    _from_config = from_config

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Does nothing: the variables exist from the beginning."""

    def create_weights(self, plan: LoadPlan | None) -> None:
        """Creates the variables with their first values: those of a checkpoint, or random ones."""
        if plan is None:
            self.init_weights()
            self.build()
        else:
            load_weights(self, plan)

    def init_weights(self) -> None:
        """Draws matrices from N(0, init_std); biases and the padding row of the embedding are zero.

        Differs: it sets the initializers of the layers, by which Keras gives variables their values when it creates
        them; in PyTorch there are parameters to fill.
        """
        for spec in self._specs().values():
            if len(spec.shape) == 2:
                normal = keras.initializers.RandomNormal(stddev=self.config.init_std)
                set_initializer(self, spec, self._without_padding(normal) if spec.name == EMBEDDING else normal)

    def _without_padding(self, initializer: Initializer) -> Initializer:
        """An initializer whose row `pad_token_id`, if the vocabulary has one, is zero."""
        rows = tf.range(self.config.vocab_size)[:, None]
        return lambda shape, dtype: tf.where(rows == self.config.pad_token_id, 0, initializer(shape, dtype))

    def _check_not_quantized(self, name: str) -> None:
        """Raises `InputError` if weights are held as integers, of which a method can make nothing."""
        for layer in all_layers(self):
            if (mode := layer.dtype_policy.quantization_mode) not in (None, "float8"):
                raise InputError(
                    f"the model is quantized to {mode}, of which {name} can make nothing; call it before quantize, "
                    "or keep the quantized model with save('model.keras')"
                )


def _set_policy(layer: keras.layers.Layer, policy: keras.DTypePolicy, quantization: Any) -> None:
    """Gives a layer the policy of one that was saved, and variables to hold the weights of that."""
    if policy.quantization_mode is None:
        layer.dtype_policy = policy
    else:
        layer.quantize(policy.quantization_mode, config=quantization)


def embedding_matrix(embeddings: Any, config: XGLMConfig) -> tf.Tensor:
    """The matrix [vocab_size, d_model] of an embedding, of a `Dense` head, or itself.

    Raises:
        InputError: it has another shape.
    """
    if isinstance(embeddings, keras.layers.Dense):
        matrix = tf.transpose(embeddings.kernel)
    else:
        matrix = tf.convert_to_tensor(getattr(embeddings, "embeddings", embeddings))
    check_embeddings(matrix.shape, config)
    return matrix
