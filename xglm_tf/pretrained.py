"""What both model classes share: initialisation, loading, saving."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from xglm_core.calls import DecoderInputs
from xglm_core.checkpoint.dtypes import FloatType, float_type
from xglm_core.checkpoint.loading import Loading, LoadPlan, plan_loading
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.keywords import writes
from xglm_core.resizing import check_embeddings, take_sizes
from xglm_core.surface import DUMMY_IDS, ModelSurface
from xglm_core.weight_names import EMBEDDING
from xglm_tf.inputs import are_arrays, batches_in_tuples, check_batch, checked_batch, failures_named, named_arguments
from xglm_tf.tracing import forget, outdated
from xglm_tf.weights import (
    Initializer,
    all_layers,
    load_weights,
    read_weight,
    set_initializer,
    weights_dtype,
    write_weight,
)

_THROUGH_TORCH = "load the checkpoint in xglm_torch, and call torch.onnx.export(model, ..., dynamo=True)"
_OTHER_FORMATS = {
    "onnx": _THROUGH_TORCH,
    "openvino": "write a SavedModel, and give its folder to openvino.convert_model",
    "torch": "load the checkpoint in xglm_torch, and call torch.export.export",
}
_QUANTIZATION = ("int8", "int4", "float8")  # What Keras offers without examples to calibrate with.


class NamedArguments(keras.layers.Layer):
    """What is called with inputs as people have them, and says in one line what is wrong with them.

    `DecoderInputs` are passed on: the inner door of the decoder.
    """

    @tf.autograph.experimental.do_not_convert  # There is nothing to convert, and it would rewrite our messages.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `call`, see there; its arguments may also be a mapping, or a list or tuple, as the first one."""
        if args and type(args[0]) is DecoderInputs:
            return super().__call__(*args, **kwargs)
        arguments = self.named_arguments(args, kwargs)
        try:
            return super().__call__(**arguments)
        except InputError as error:
            # Keras buries the message in a listing of the arguments. Ours says all in one line.
            ours = error.__context__ if isinstance(error.__context__, InputError) else error
            raise ours from None

    def named_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; see `xglm_tf.inputs.named_arguments`."""
        return named_arguments(*_parameters_of(type(self).call), args, kwargs)


class TFXGLMPreTrainedModel(ModelSurface, NamedArguments, keras.Model):
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

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """See `keras.Model.fit`; and `predict` for the checks."""
        with failures_named(self.config):
            return super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """See `keras.Model.evaluate`; and `predict` for the checks."""
        with failures_named(self.config):
            return super().evaluate(*args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """See `keras.Model.predict`: the outputs as numpy arrays, that is, all logits unless told otherwise.

        Args:
            x: arrays, which may have options of the call beside them, e.g. `{"input_ids": ids, "logits_to_keep": 1}`;
                or a dataset.
            args, kwargs: see `keras.Model.predict`.

        Raises:
            InputError: ids or positions are outside what the model can read; before anything is computed if `x` is
                arrays, else before their batch is.
        """
        options: dict[str, Any] = {}
        x = batches_in_tuples(x)
        if are_arrays(x):
            x = self.named_arguments([x], {})
            options = {name: value for name, value in x.items() if isinstance(value, int)}
            x = {name: value for name, value in x.items() if name not in options and value is not None}
            check_batch(self.config, x, None)
        self.__dict__["_predicted_with"] = tuple(sorted(options.items()))
        try:
            with failures_named(self.config):
                return super().predict(x, *args, **kwargs)
        finally:
            del self.__dict__["_predicted_with"]

    def predict_on_batch(self, x: Any) -> Any:
        """See `keras.Model.predict_on_batch`, and `predict`."""
        with failures_named(self.config):
            return super().predict_on_batch(x)

    def predict_step(self, data: Any) -> Any:
        """The outputs for a batch, without a cache, which nobody could use."""
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        wanted = {**dict(self.__dict__.get("_predicted_with", ())), "use_cache": False, "training": False}
        arguments = {**self.named_arguments([inputs], {}), **wanted}
        arguments.pop("labels", None)  # A loss per batch cannot be put together with others.
        return self(**arguments)

    def _autoconvert_optionals(self, step_func: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What Keras makes of a step, with checks before it: it has no other place outside of what XLA may compile."""

        @tf.autograph.experimental.do_not_convert
        def checked(data: Any) -> tuple[Any, ...]:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            inputs = {name: value for name, value in self.named_arguments([x], {}).items() if value is not None}
            return checked_batch(self.config, inputs, self.labels_to_check(inputs, y)), y, sample_weight

        def run(data: Any) -> Any:
            # Parts of several devices, in the scope of the strategy or not: to be checked on each.
            apart = any(isinstance(part, tf.distribute.DistributedValues) for part in tf.nest.flatten(data))
            return step_func(self.distribute_strategy.run(checked, args=(data,)) if apart else checked(data))

        return super()._autoconvert_optionals(run)

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

    def prepare_tf_dataset(
        self,
        dataset: Any,
        batch_size: int = 8,
        shuffle: bool = True,
        tokenizer: Any = None,
        collate_fn: Callable[..., Mapping[str, Any]] | None = None,
        collate_fn_args: Mapping[str, Any] | None = None,
        drop_remainder: bool | None = None,
        prefetch: bool = True,
    ) -> tf.data.Dataset:
        """Makes batches for `fit`, `evaluate` and `predict` of a `datasets.Dataset`.

        Args:
            dataset: rows of what a call takes by name; its other columns are left out.
            batch_size: rows of a batch.
            shuffle: whether each epoch has the rows in another order.
            tokenizer: pads the rows of a batch; labels are not padded. None means that all rows have one length.
            collate_fn: makes a batch of a list of rows, in place of `tokenizer`, and may add labels.
            collate_fn_args: its further arguments, by name.
            drop_remainder: whether to leave out a last batch that is not full; None means if `shuffle`.
            prefetch: whether a batch is made while the one before is in use.

        Returns:
            Batches of inputs by name, or pairs of these and the labels. A single input is a tensor without its name.

        Raises:
            InputError: it is no such dataset, is empty, or has no column that a call takes.
        """
        known = _parameters_of(type(self).call)[1]
        columns = [name for name in getattr(dataset, "column_names", ()) if name in known]
        if not hasattr(dataset, "to_tf_dataset") or not columns or not len(dataset):
            raise InputError(
                "dataset has no rows of input_ids, expected a datasets.Dataset of encoded texts; encode it: "
                "dataset.map(lambda row: tokenizer(row['text']))"
            )
        if collate_fn is None and tokenizer is not None:
            collate_fn = functools.partial(tokenizer.pad, return_tensors="np")
        if collate_fn is not None:  # Which may make others of them.
            row = dataset.select_columns(columns)[0]
            columns = [name for name in collate_fn([row], **(collate_fn_args or {})) if name in known]
        inputs = [name for name in columns if name != "labels"]
        return dataset.to_tf_dataset(
            columns=inputs if len(inputs) > 1 else inputs[0],  # Of a list of one, `datasets` warns.
            label_cols="labels" if "labels" in columns else None,
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=collate_fn,
            collate_fn_args=collate_fn_args,
            drop_remainder=shuffle if drop_remainder is None else drop_remainder,
            prefetch=prefetch,
        )

    def labels_to_check(self, inputs: Mapping[str, Any], y: Any) -> Any:
        """The labels of a batch, if they are tokens; None for what else there may be to learn."""
        return None

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

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Writes a SavedModel that TensorFlow runs without this package; or a file for LiteRT, once TensorFlow Lite.

        Its signature `serving_default`, which is also its method `serve`, takes `input_ids` and `attention_mask`, int32
        [batch, length] of any size, and returns the first output by its name. Nothing is checked there: see `call`.

        Args:
            filepath: the folder to write, or the file.
            format: "tf_saved_model" or "litert".
            verbose, kwargs: see `keras.Model.export`.
            input_signature: specifications of other inputs, as `call` takes them. LiteRT needs them, with all sizes.

        Raises:
            InputError: it is another format, or LiteRT would not know the sizes.
        """
        if format in _OTHER_FORMATS:
            raise InputError(f"export writes no {format!r}; {_OTHER_FORMATS[format]}")
        if format not in ("tf_saved_model", "litert"):
            super().export(filepath, format, verbose, input_signature, **kwargs)
            return
        shapes = [one.shape for one in input_signature or ()]
        if format == "litert" and (not shapes or any(None in tuple(shape) for shape in shapes)):
            raise InputError(
                "export to 'litert' needs the sizes of its inputs; expected input_signature, for example "
                "[tf.TensorSpec((1, 32), tf.int32, name) for name in ('input_ids', 'attention_mask')]"
            )
        if format == "litert":
            with tempfile.TemporaryDirectory() as folder:
                self.export(folder, verbose=verbose, input_signature=input_signature, **kwargs)
                Path(filepath).write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())
            return

        def serve(*inputs: Any) -> dict[str, tf.Tensor]:
            outputs = self(*inputs, use_cache=False, return_dict=True)
            return {outputs.keys()[0]: outputs[0]}

        if input_signature is None:
            input_signature = list(self.input_signature.values())
        archive = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint("serve", serve, input_signature)
        archive.write_out(filepath, verbose=bool(verbose), **kwargs)

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
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """What `export` asks for by default: ids and mask, int32 [batch, length] of any size."""
        return {name: tf.TensorSpec((None, None), tf.int32, name) for name in ("input_ids", "attention_mask")}

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

    def forget_compiled(self) -> None:
        """Drops compiled code, which holds on to variables that have been replaced."""
        self.train_function = self.test_function = self.predict_function = None
        forget(self)

    def make_train_function(self, force: bool = False) -> None:
        """See `keras.Model`; what was compiled of another state of the model is compiled anew."""
        trainable = tuple(variable.trainable for variable in self.variables)
        super().make_train_function(outdated(self, "train", trainable, *self.step_options(training=True)) or force)

    def make_test_function(self, force: bool = False) -> None:
        """See `make_train_function`."""
        super().make_test_function(outdated(self, "test", *self.step_options(training=False)) or force)

    def make_predict_function(self, force: bool = False) -> None:
        """See `make_train_function`."""
        options = self.__dict__.get("_predicted_with", ())
        super().make_predict_function(outdated(self, "predict", options) or force)

    def step_options(self, *, training: bool) -> tuple[Any, ...]:
        """What a compiled step of `fit` or `evaluate` depends on besides the model."""
        return ()

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


@functools.cache
def _parameters_of(call: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The names of what a method takes by position, and of all that it takes."""
    parameters = list(inspect.signature(call).parameters.values())[1:]
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return positional, [parameter.name for parameter in parameters]


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
