"""The Flax backend, and what it shares with transformers' model in Flax."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from xglm_core.backends import load_backend
from xglm_core.bench import base
from xglm_core.bench.cases import Job, Run, count_new, prompts, token_ids
from xglm_core.bench.torch import loss_inputs

PACKAGES = ("jax", "flax")


class Engine(base.Engine):
    """Runs the cases."""

    def __init__(self, job: Job) -> None:
        import jax

        super().__init__(job)
        self.jax = jax

    def read_weights(self, model: Any) -> None:
        """Reads all weights."""
        sum(float(leaf.sum()) for leaf in self.jax.tree.leaves(model.params))

    def prefill(self) -> Run:
        """The last logits, compiled."""

        @self.jax.jit
        def last(params: Any, tokens: Any) -> Any:
            return self.model(tokens, params=params, logits_to_keep=1).logits[:, -1].argmax(-1)

        tokens = self._tokens()
        return Run(lambda: self.jax.block_until_ready(last(self.model.params, tokens)))

    def score(self) -> Run:
        """The log-probabilities of the tokens."""
        tokens = self._tokens()
        return Run(lambda: self.jax.block_until_ready(self.model.score(tokens)))

    def decode(self) -> Run:
        """Greedy."""
        ids, mask, ends = prompts(self.job, self.model.config)
        tokens, attention_mask = (self.jax.numpy.asarray(array, "int32") for array in (ids, mask))

        def new_tokens(new: int) -> Any:
            stop = {"eos_token_id": ends} if ends else {"min_new_tokens": new}
            rows = self.model.generate(
                tokens, attention_mask=attention_mask, max_new_tokens=new, do_sample=False, **stop
            )
            return self.jax.device_get(getattr(rows, "sequences", rows))[:, self.job.length :]

        return Run(lambda: count_new(new_tokens(self.job.new), ends), lambda: new_tokens(1))

    def train(self) -> Run:
        """Loss and gradients, as one trains where memory is short.

        The blocks are scanned, and computed again in the backward pass but for three products.
        """
        package = load_backend("flax")
        keep = self.jax.checkpoint_policies.save_only_these_names("k_proj", "v_proj", "out_proj")
        model = self.loaded(scan_layers=True, remat=keep)
        model.params = package.stack_layers(model.params)
        tokens = self.jax.numpy.asarray(token_ids(self.job, model.config), "int32")
        return self.steps(package.make_loss_fn(model), model.params, {"input_ids": tokens, "labels": tokens})

    def steps(self, loss: Any, params: Any, batch: Any) -> Run:
        """The gradients of a loss of parameters, batch and key, in the memory of those of the last step."""
        jax, gradients = self.jax, list[Any]()

        @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
        def step(before: Any, *arguments: Any) -> Any:
            return jax.value_and_grad(loss)(*arguments)

        def run() -> None:
            before = gradients.pop() if gradients else jax.tree.map(jax.numpy.zeros_like, params)
            gradients.append(jax.block_until_ready(step(before, params, batch, jax.random.key(0))[1]))

        return Run(run)

    def loss(self) -> Run:
        """The loss and the gradients of states and head, compiled."""
        causal_lm_loss = importlib.import_module("xglm_flax.loss").causal_lm_loss
        states, head, labels = loss_inputs(self.job)
        # JAX copies arrays in the background; until that is done, both copies exist.
        given = self.jax.block_until_ready(tuple(map(self.jax.numpy.asarray, (states, head))))
        targets = self.jax.numpy.asarray(labels, "int32")
        gradients = self.jax.jit(self.jax.grad(lambda *pair: causal_lm_loss(*pair, targets).loss, (0, 1)))
        return Run(lambda: self.jax.block_until_ready(gradients(*given)))

    def device_memory(self) -> float | None:
        """The most memory of the GPU that was in use [MB]."""
        gpu = self.job.device == "gpu"
        return self.jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e6 if gpu else None

    def _tokens(self) -> Any:
        return self.jax.numpy.asarray(token_ids(self.job, self.model.config), "int32")
