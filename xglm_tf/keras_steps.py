"""Calls and steps as Keras makes them: checks around `fit`, `evaluate` and `predict`, and what is compiled for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from xglm_core.calls import DecoderInputs
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_tf.inputs import are_arrays, batches_in_tuples, check_batch, checked_batch, failures_named, named_arguments
from xglm_tf.tracing import forget, outdated


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


class KerasSteps(NamedArguments, keras.Model):
    """What all models do around Keras' own `fit`, `evaluate` and `predict`; `Training` adds the built-in loss."""

    config: XGLMConfig

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

    def step_options(self, *, training: bool) -> tuple[Any, ...]:
        """What a compiled step of `fit` or `evaluate` depends on besides the model."""
        return ()

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

    def forget_compiled(self) -> None:
        """Drops compiled code, which holds on to variables that have been replaced."""
        self.train_function = self.test_function = self.predict_function = None
        forget(self)


@functools.cache
def _parameters_of(call: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The names of what a method takes by position, and of all that it takes."""
    parameters = list(inspect.signature(call).parameters.values())[1:]
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return positional, [parameter.name for parameter in parameters]
