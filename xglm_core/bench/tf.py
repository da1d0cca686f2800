"""The TensorFlow backend, and what it shares with transformers' model in TensorFlow."""

from __future__ import annotations

import importlib
from typing import Any

from xglm_core.bench import base
from xglm_core.bench.cases import Job, Run, count_new, prompts, token_ids
from xglm_core.bench.torch import loss_inputs
from xglm_core.loss import LossOptions

PACKAGES = ("tensorflow", "tensorflow-cpu", "keras")


class Engine(base.Engine):
    """Runs the cases."""

    def __init__(self, job: Job) -> None:
        import tensorflow

        super().__init__(job)
        self.tf = tensorflow

    def read_weights(self, model: Any) -> None:
        """Reads all weights."""
        sum(float(self.tf.reduce_sum(weight)) for weight in model.trainable_variables)

    def prefill(self) -> Run:
        """The last logits, compiled."""

        @self.tf.function
        def last(tokens: Any) -> Any:
            return self.tf.argmax(self.model(tokens, logits_to_keep=1).logits[:, -1], -1)

        return self._call(last)

    def score(self) -> Run:
        """The log-probabilities of the tokens."""
        return self._call(self.model.score)

    def decode(self) -> Run:
        """Greedy."""
        ids, mask, ends = prompts(self.job, self.model.config)
        tokens, attention_mask = (self.tf.constant(array, self.tf.int32) for array in (ids, mask))

        def new_tokens(new: int) -> Any:
            stop = {"eos_token_id": ends} if ends else {"min_new_tokens": new}
            rows = self.model.generate(
                tokens, attention_mask=attention_mask, max_new_tokens=new, do_sample=False, **stop
            )
            return rows.numpy()[:, self.job.length :]

        return Run(lambda: count_new(new_tokens(self.job.new), ends), lambda: new_tokens(1))

    def train(self) -> Run:
        """Loss and gradients, compiled."""

        @self.tf.function
        def gradients(tokens: Any) -> Any:
            with self.tf.GradientTape() as tape:
                loss = self.model(tokens, labels=tokens, use_cache=False, training=True).loss
            return loss, tape.gradient(loss, self.model.trainable_variables)

        return self._call(lambda tokens: self.tf.reduce_sum(gradients(tokens)[0]))

    def loss(self) -> Run:
        """The loss and the gradients of states and head, compiled."""
        causal_lm_loss = importlib.import_module("xglm_tf.loss").causal_lm_loss
        states, head, labels = loss_inputs(self.job)
        given, targets = [self.tf.Variable(array) for array in (states, head)], self.tf.constant(labels, self.tf.int32)

        @self.tf.function
        def gradients() -> Any:
            with self.tf.GradientTape() as tape:
                hidden, matrix = map(self.tf.convert_to_tensor, given)
                loss = causal_lm_loss(hidden, matrix, targets, options=LossOptions(), training=True).loss
            return tape.gradient(loss, given)

        def run() -> None:
            for gradient in gradients():
                self.tf.reshape(gradient, (-1,))[0].numpy()

        return Run(run)

    def device_memory(self) -> float | None:
        """The most memory of the GPU that was in use [MB]."""
        gpu = self.job.device == "gpu"
        return self.tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e6 if gpu else None

    def _call(self, function: Any) -> Run:
        tokens = self.tf.constant(token_ids(self.job, self.model.config), self.tf.int32)

        def run() -> None:
            function(tokens).numpy()

        return Run(run)
