"""Training in Keras' own way: what `compile`, `fit`, `evaluate` and `train_on_batch` do with the built-in loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from xglm_core.calls import DecoderInputs, DecoderResults, Wanted
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import is_overridden
from xglm_core.loss import LossOptions, LossOutput, check_trainable_type
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_tf.cache import TFXGLMCache, as_cache
from xglm_tf.inputs import are_arrays, batches_in_tuples, check_arguments, check_batch, check_head_arguments
from xglm_tf.loss import causal_lm_loss, counted_labels, targets_and_weights
from xglm_tf.tying import with_one_gradient

_BUILT_IN = ("accuracy", "acc", "perplexity")  # In `compile`, the names of what is there in any case.


class Perplexity(keras.metrics.Mean):
    """exp of the mean of surprisals. Callbacks that monitor it need `mode="min"`."""

    def result(self) -> tf.Tensor:
        """float32 scalar."""
        return tf.exp(super().result())


class TokenMetrics:
    """Means over tokens: loss, accuracy and perplexity. No list, which Keras would save with the weights."""

    def __init__(self) -> None:
        mean = keras.metrics.Mean
        self.all = mean(name="loss"), mean(name="accuracy"), Perplexity(name="perplexity")

    def update(self, total: tf.Tensor, surprisal: tf.Tensor, correct: tf.Tensor, count: tf.Tensor) -> None:
        """Adds the sums over a batch with `count` tokens."""
        for metric, value in zip(self.all, (total, correct, surprisal), strict=True):
            metric.update_state(tf.math.divide_no_nan(value, count), sample_weight=count)


class Training(keras.Model):
    """What a causal language model adds to Keras' training.

    Without `loss` in `compile`, the loss is that of `labels`, which are among the inputs or the second part of
    `(inputs, labels)`: the tokens themselves, -100 where none counts, nothing shifted. It is the mean over all tokens
    of the global batch, or with sample weights, [batch] or [batch, length], their weighted mean. The metrics `loss`,
    `accuracy` and `perplexity` are means over tokens, too.

    Other `metrics` in `compile` are given logits, and the token that each of them predicts, with weights that are 0
    where none counts. `class_weight` is by token id, and multiplies the sample weights.

    With `loss` in `compile`, Keras computes that, of labels and logits as they are: position i of the logits predicts
    label i + 1, so such labels are given shifted. The same holds for `metrics` beside it.
    """

    loss_options = LossOptions()  # What is added to the loss; may be set at any time.

    def step_options(self, *, training: bool) -> tuple[Any, ...]:
        """See `TFXGLMPreTrainedModel.step_options`."""
        return self.loss_options, self._class_weight() if training else ()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """See `keras.Model.compile`; without `loss` there is the built-in one, with its accuracy and perplexity.

        Raises:
            InputError: the trainable variables are float16 and the optimizer is no `LossScaleOptimizer`; or
                `jit_compile` is True, with a distribution strategy that TensorFlow cannot compile.
        """
        given = _by_name("compile", args, kwargs)
        self._compile_loss = self._compile_metrics = self.loss = None  # Keras would keep those of an earlier call.
        if given.get("loss") is None:
            metrics = keras.tree.flatten([given.pop("metrics", None), given.pop("weighted_metrics", None)])
            others = [metric for metric in metrics if metric is not None and metric not in _BUILT_IN]
            given["weighted_metrics"] = others or None
        super().compile(**given)
        if self.jit_compile:
            _check_compilable(self.distribute_strategy)
        if self.optimizer is not None and not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            for dtype in {variable.dtype for variable in self.trainable_variables}:
                check_trainable_type(dtype)
        self.__dict__.pop("token_metrics", None)
        _ = self.token_metrics  # Now, in the scope of a distribution strategy.

    def get_config(self) -> dict[str, Any]:
        """See `TFXGLMPreTrainedModel.get_config`; with the options of loss and `generate`."""
        options = {
            "loss_options": dataclasses.asdict(self.loss_options),
            "generation_config": self.generation_config.to_dict(),
        }
        return {**super().get_config(), **options}

    @classmethod
    def from_config(cls, config: XGLMConfig | dict[str, Any], custom_objects: Any = None, **kwargs: Any) -> Self:
        """See `TFXGLMPreTrainedModel.from_config`."""
        if isinstance(config, XGLMConfig) or "config" not in config:
            return super().from_config(config, **kwargs)
        options = dict(config)
        loss, generation = options.pop("loss_options", {}), options.pop("generation_config", None)
        model = super().from_config(options, **kwargs)
        model.loss_options = LossOptions(**loss)
        if generation is not None:
            model.generation_config = GenerationConfig.from_dict(generation)
        return model

    _from_config = from_config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as a saved model was, with room for the state of its optimizer."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    @functools.cached_property
    def token_metrics(self) -> TokenMetrics:
        """The metrics of the built-in loss."""
        return TokenMetrics()

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics; those of the built-in loss take the place of Keras' mean over batches."""
        metrics = super().metrics
        if not self.compiled or self.loss is not None:
            return metrics
        return [*self.token_metrics.all, *(metric for metric in metrics if metric is not self._loss_tracker)]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """A step of `fit`."""
        x, y, sample_weight = self._with_labels(data)
        if self._class_weight():
            sample_weight = self._weights_by_id(y, sample_weight)
        if self._has_own_loss:
            return self._to_average(super().train_step((x, y, sample_weight)))
        with tf.GradientTape() as tape:
            loss, logits = self._loss_and_logits(x, y, sample_weight, training=True)
            loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return self._to_average(self.compute_metrics(x, y, logits, sample_weight))

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """A step of `evaluate`."""
        x, y, sample_weight = self._with_labels(data)
        if self._has_own_loss:
            return self._to_average(super().test_step((x, y, sample_weight)))
        _, logits = self._loss_and_logits(x, y, sample_weight, training=False)
        return self._to_average(self.compute_metrics(x, y, logits, sample_weight))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> tf.Tensor:
        """The loss of a step that `compile` was given."""
        return super().compute_loss(x, _labels(x, y), _logits(y_pred), sample_weight, training)

    @property
    def _has_own_loss(self) -> bool:
        """Whether a loss of the user's takes the place of the built-in one: of `compile`, or of a subclass."""
        return self.loss is not None or is_overridden(self, Training, "compute_loss")

    def _loss_and_logits(
        self, x: Mapping[str, Any], y: Any, sample_weight: Any, *, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """The built-in loss, whose sum over the replicas is that of the global batch; updates the built-in metrics.

        The logits are for the metrics in `compile`: None if there are none.
        """
        x, y = keras.tree.map_structure(tf.convert_to_tensor, (x, y))  # Arrays, if Keras runs eagerly.
        inputs = DecoderInputs(*map(x.get, DecoderInputs._fields))
        cache = as_cache(x.get("past_key_values"), self.config)
        check_head_arguments(self.config, inputs, y, 0)
        check_arguments(self.config, inputs, cache)
        y = counted_labels(y, inputs.attention_mask)
        weights = None if sample_weight is None else _weights_of_labels(tf.convert_to_tensor(sample_weight), y)
        replica = tf.distribute.get_replica_context()
        replicas = 1 if replica is None else replica.num_replicas_in_sync

        def summed(*values: tf.Tensor) -> Sequence[tf.Tensor]:
            return values if replicas == 1 else replica.all_reduce(tf.distribute.ReduceOp.SUM, list(values))

        # Keras adds up the gradients of the replicas. So each divides by what all of them have.
        (count,) = summed(tf.reduce_sum(targets_and_weights(y, weights)[1]))
        items = tf.cast(x.get("num_items_in_batch", count), tf.float32)
        results, output = decode_with_loss(self, inputs, cache, Wanted(), y, items, weights, training=training)
        assert output is not None  # As there are labels.
        loss, surprisal, correct = summed(tf.stop_gradient(output.loss), output.surprisal, output.correct)
        # Every replica has the sums of all, and Keras adds up what the replicas have.
        sums = (loss * items, surprisal, correct, count)
        self.token_metrics.update(*(value / replicas for value in sums))
        logits = None if self._compile_metrics is None else self.logits(results.last_hidden_state)
        return output.loss + sum(map(tf.reduce_sum, self.losses)), logits

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The metrics so far; those named in `compile` are given the logits."""
        y = _labels(x, y)
        if self.loss is None and self._compile_metrics is not None:
            y = counted_labels(tf.convert_to_tensor(y), x.get("attention_mask"))
            weights = None if sample_weight is None else _weights_of_labels(tf.convert_to_tensor(sample_weight), y)
            y, sample_weight = targets_and_weights(y, weights)
        return super().compute_metrics(x, y, _logits(y_pred), sample_weight)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """See `keras.Model.fit`, and this class.

        Raises:
            InputError: there are no labels, or ids, labels or positions are outside what the model can read: before
                any step if they are arrays, else before that of their batch. Or `class_weight` is not by token id.
        """
        given = self._given("fit", args, kwargs)
        class_weight = given.pop("class_weight", None)
        if (validation := given.get("validation_data")) is not None and are_arrays(validation):
            given["validation_data"] = self._prepared(*keras.utils.unpack_x_y_sample_weight(validation))
        with self._weighing(class_weight):
            return super().fit(**given)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """See `keras.Model.evaluate`, and `fit`."""
        return super().evaluate(**self._given("evaluate", args, kwargs))

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """See `keras.Model.train_on_batch`, and `fit`."""
        given = self._given("train_on_batch", args, kwargs)
        with self._weighing(given.pop("class_weight", None)):
            return super().train_on_batch(**given)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """See `keras.Model.test_on_batch`, and `fit`."""
        return super().test_on_batch(**self._given("test_on_batch", args, kwargs))

    def _given(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a method of Keras by name, with labels apart from inputs, and arrays checked."""
        given = _by_name(method, args, kwargs)
        data = [given.get(name) for name in ("x", "y", "sample_weight")]
        return {**given, **dict(zip(("x", "y", "sample_weight"), self._prepared(*data), strict=True))}

    def _prepared(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Arrays, checked, with the labels apart: Keras leaves weights out if there are only inputs."""
        if not are_arrays(x):
            return batches_in_tuples(x), y, sample_weight
        inputs, labels = self._inputs_and_labels(x, y)
        if isinstance(labels, list | tuple):
            labels = np.asarray(labels)
        check_batch(self.config, inputs, labels if self.loss is None else None)
        return inputs, labels, sample_weight

    @contextlib.contextmanager
    def _weighing(self, class_weight: Mapping[int, float] | None) -> Iterator[None]:
        """Has steps weigh labels by their id."""
        for token, weight in (class_weight or {}).items():
            if token not in range(self.config.vocab_size) or not weight >= 0:
                raise InputError(
                    f"class_weight has {weight!r} for {token!r}, expected a number from 0 for an id from 0 to "
                    f"{self.config.vocab_size - 1}: classes are the tokens of the vocabulary"
                )
        self.__dict__["_weights_of_ids"] = tuple(sorted((class_weight or {}).items()))
        try:
            yield
        finally:
            self.__dict__["_weights_of_ids"] = ()

    def _class_weight(self) -> tuple[tuple[int, float], ...]:
        """Pairs of an id and its weight; all others weigh 1."""
        return self.__dict__.get("_weights_of_ids", ())

    def enable_lora(
        self,
        rank: int,
        layers: Iterable[int] | None = None,
        *,
        projections: Sequence[str] = ("q_proj", "v_proj"),
        lora_alpha: float | None = None,
    ) -> None:
        """Gives projections of the self-attention low-rank adapters, and freezes all else.

        See Hu et al., arXiv 2106.09685.

        Call `compile` afterwards. `save_pretrained`, `save` and `save_weights` write the sum of weight and adapter, so
        what is loaded has none, and is trainable in all its parts; the state of the optimizer does not fit it.

        Args:
            rank: of the adapters.
            layers: the blocks that get them, by index; None means all.
            projections: some of `q_proj`, `k_proj`, `v_proj`, `out_proj`.
            lora_alpha: the factor of an adapter, times `rank`; None means `rank`, a factor of 1.

        Raises:
            InputError: there is no such block or projection, `rank` is not positive, or there are adapters already.
        """
        known = ("q_proj", "k_proj", "v_proj", "out_proj")
        chosen = list(range(self.config.num_layers) if layers is None else layers)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise InputError(f"rank is {rank!r}, expected a positive integer")
        if unknown := [index for index in chosen if index not in range(self.config.num_layers)]:
            raise InputError(f"there are no blocks {unknown}, expected some of 0 to {self.config.num_layers - 1}")
        if unnamed := [name for name in projections if name not in known]:
            raise InputError(f"there are no projections {unnamed}, expected some of {', '.join(known)}")
        if self.has_lora:
            raise InputError("there are adapters already; save_pretrained merges them, and a loaded model has none")
        for variable in self.trainable_variables:
            variable.trainable = False
        for index in chosen:
            for name in projections:
                getattr(self.model.layers[index].self_attn, name).enable_lora(rank, lora_alpha)
        self.forget_compiled()

    def _to_average(self, logs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The results of a step in the shape in which Keras averages them: over processes, along the first axis."""
        several = isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy)
        return {name: value[None] for name, value in logs.items()} if several else logs

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Keras' preparation for a distribution strategy, of which only the optimizer is left to be done.

        Keras would average the first batch over the processes of a `MultiWorkerMirroredStrategy`, and fail with inputs
        by name.
        """
        if self.loss is not None or self._compile_metrics is not None:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        elif self._distribute_strategy is not None and self.optimizer is not None and not self.optimizer.built:
            with self._distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def _with_labels(self, data: Any) -> tuple[dict[str, Any], Any, Any]:
        """A batch of `fit` as arguments by name, labels, and sample weights."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        arguments, labels = self._inputs_and_labels(x, y)
        return {**arguments, "use_cache": False, "return_dict": True}, labels, sample_weight

    def _inputs_and_labels(self, x: Any, y: Any) -> tuple[dict[str, Any], Any]:
        """Arguments by name, and the labels, which are among them or apart, alone or by their name."""
        arguments = {name: value for name, value in self.named_arguments([x], {}).items() if value is not None}
        labels = arguments.pop("labels", None)
        if isinstance(y, Mapping):
            if list(y) != ["labels"]:
                raise InputError(f"the targets are {list(y)}, expected 'labels' alone; inputs are in the first part")
            y = y["labels"]
        if labels is None and y is None:
            raise InputError("there are no labels; expected 'labels' among the inputs, or data of (inputs, labels)")
        if labels is not None and y is not None:
            raise InputError("labels are given twice, expected once: among the inputs, or in (inputs, labels)")
        return arguments, labels if y is None else y

    def labels_to_check(self, inputs: Mapping[str, Any], y: Any) -> Any:
        """Those of the built-in loss; a loss of the user's own may compare with anything."""
        if self.loss is not None:
            return None
        return inputs.get("labels", y.get("labels") if isinstance(y, Mapping) else y)

    def _weights_by_id(self, labels: Any, sample_weight: Any) -> tf.Tensor:
        """The weights of the labels' ids, float32 [batch, length], times sample weights, if there are any."""
        of_ids = np.ones(self.config.vocab_size, np.float32)
        for token, weight in self._class_weight():
            of_ids[token] = weight
        labels = tf.convert_to_tensor(labels)
        weights = tf.gather(of_ids, tf.maximum(tf.cast(labels, tf.int32), 0))  # -100 has no weight in any case.
        if sample_weight is None:
            return weights
        return weights * tf.cast(_weights_of_labels(tf.convert_to_tensor(sample_weight), labels), tf.float32)


def decode_with_loss(
    model: Any,
    inputs: DecoderInputs,
    cache: TFXGLMCache | None,
    wanted: Wanted,
    labels: tf.Tensor | None,
    num_items_in_batch: int | tf.Tensor | None = None,
    weights: tf.Tensor | None = None,
    *,
    training: bool = False,
) -> tuple[DecoderResults, LossOutput | None]:
    """Decodes, and computes the loss of a causal language model if there are labels; see `causal_lm_loss`.

    In training, the two uses of a tied matrix have one gradient. Nothing is checked.
    """
    if labels is None:
        return model.model(inputs, cache, wanted, training=training), None
    mask, head = inputs.attention_mask, model.model.embed_tokens.embeddings if model.lm_head is None else model.lm_head
    if training:
        inputs, head = with_one_gradient(model, inputs)
    results = model.model(inputs, cache, wanted, training=training)
    loss = causal_lm_loss(
        results.last_hidden_state,
        head,
        counted_labels(labels, mask),
        num_items_in_batch,
        options=model.loss_options,
        weights=weights,
        training=training,
        # With an adapter, the matrix is a sum.
        train_head=getattr(getattr(head, "kernel", head), "trainable", True),
    )
    return results, loss


def _by_name(method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method of `keras.Model` by name."""
    given = dict(inspect.signature(getattr(keras.Model, method)).bind(None, *args, **kwargs).arguments)
    more = given.pop("kwargs", {})
    del given["self"]
    return given | more


def _check_compilable(strategy: tf.distribute.Strategy) -> None:
    """Checks that XLA can compile a step of a strategy.

    It cannot where one program uses variables of several devices, or sums over processes on CPUs.

    Raises:
        InputError: there are several devices, or processes with CPUs.
    """
    if not isinstance(strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy):
        return
    replicas, devices = strategy.num_replicas_in_sync, strategy.extended.worker_devices
    if len(devices) > 1 or (replicas > 1 and "CPU" in devices[0]):
        raise InputError(
            f"jit_compile is True for {replicas} replicas of a distribution strategy, and TensorFlow cannot compile a "
            "step of theirs with XLA; expected jit_compile=False or 'auto'"
        )


def _labels(x: Any, y: Any) -> Any:
    """The labels of a step; where Keras prepares the first one, they may still be among the inputs."""
    return x["labels"] if y is None and isinstance(x, dict) else y


def _logits(y_pred: Any) -> Any:
    """What Keras' own losses and metrics compare with labels."""
    return y_pred.logits if isinstance(y_pred, CausalLMOutputWithCrossAttentions) else y_pred


def _weights_of_labels(sample_weight: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Sample weights for each label [batch, length].

    Raises:
        InputError: they have another shape.
    """
    shape, expected = sample_weight.shape, labels.shape
    # Keras traces one function for weights of both kinds, which knows of no shape.
    if not any(shape.is_compatible_with(fitting) for fitting in (expected[:1], [expected[0], 1], expected)):
        raise InputError(f"sample_weight is {list(shape)}, expected {list(expected[:1])} or {list(expected)}")
    rows = tf.shape(labels)[0]  # May be 0, for which TensorFlow infers no other size.
    columns = tf.maximum(tf.size(sample_weight) // tf.maximum(rows, 1), 1)
    return tf.broadcast_to(tf.reshape(sample_weight, (rows, columns)), tf.shape(labels))
