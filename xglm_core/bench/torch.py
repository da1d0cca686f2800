"""The PyTorch backend, and what it shares with transformers' model in PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from xglm_core.bench import base
from xglm_core.bench.cases import Job, Run, count_new, prompts, token_ids
from xglm_core.config import XGLMConfig
from xglm_core.loss import LossOptions

PACKAGES = ("torch",)


def loss_inputs(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random states [rows, length, d_model], a head [vocab_size, d_model], and labels [rows, length]."""
    config, stream = XGLMConfig.from_pretrained(job.checkpoint), np.random.default_rng(0)
    states = stream.standard_normal((job.rows, job.length, config.d_model), np.float32)
    head = stream.standard_normal((config.vocab_size, config.d_model), np.float32)
    head *= 0.02
    return states, head, token_ids(job, config)


class Engine(base.Engine):
    """Runs the cases."""

    def __init__(self, job: Job) -> None:
        import torch

        super().__init__(job)
        self.torch, self.device = torch, "cuda" if job.device == "gpu" else "cpu"

    def loaded(self, **options: Any) -> Any:
        """The model, fresh from its files."""
        return super().loaded(**options).to(self.device)

    def read_weights(self, model: Any) -> None:
        """Reads all weights."""
        sum(float(parameter.sum()) for parameter in model.parameters())

    def prefill(self) -> Run:
        """The last logits."""
        tokens = self._tokens()

        def run() -> None:
            with self.torch.inference_mode():
                self.last_logits(tokens).argmax(-1).tolist()

        return Run(run)

    def last_logits(self, tokens: Any) -> Any:
        """[rows, vocab_size]."""
        return self.model(tokens, logits_to_keep=1).logits[:, -1]

    def score(self) -> Run:
        """The log-probabilities of the tokens."""
        tokens = self._tokens()
        return Run(lambda: self.scores(tokens).tolist())

    def scores(self, tokens: Any) -> Any:
        """[rows, length - 1]."""
        return self.model.score(tokens)

    def decode(self) -> Run:
        """Greedy."""
        ids, mask, ends = prompts(self.job, self.model.config)
        tokens, attention_mask = (self.torch.from_numpy(array).to(self.device) for array in (ids, mask))

        def new_tokens(new: int) -> Any:
            stop = {"eos_token_id": ends} if ends else {"min_new_tokens": new}
            rows = self.model.generate(
                tokens, attention_mask=attention_mask, max_new_tokens=new, do_sample=False, **stop
            )
            return rows[:, self.job.length :].tolist()

        return Run(lambda: count_new(new_tokens(self.job.new), ends), lambda: new_tokens(1))

    def train(self) -> Run:
        """Loss and gradients."""
        tokens = self._tokens()
        self.model.train()

        def run() -> None:
            self.model(tokens, labels=tokens, use_cache=False).loss.backward()
            self.model.zero_grad(set_to_none=True)
            self._wait()

        return Run(run)

    def loss(self) -> Run:
        """The loss and the gradients of states and head."""
        states, head, labels = loss_inputs(self.job)
        given = [self.torch.from_numpy(array).to(self.device).requires_grad_() for array in (states, head)]
        targets = self.torch.from_numpy(labels).to(self.device)

        def run() -> None:
            self.loss_of(given[0], given[1], targets).backward()
            for tensor in given:
                tensor.grad = None
            self._wait()

        return Run(run)

    def loss_of(self, states: Any, head: Any, labels: Any) -> Any:
        """The mean loss, of chunks of the logits."""
        module = importlib.import_module("xglm_torch.loss")
        return module.causal_lm_loss(states, head, labels, options=LossOptions()).loss

    def device_memory(self) -> float | None:
        """The most memory of the GPU that was in use [MB]."""
        return self.torch.cuda.max_memory_allocated() / 1e6 if self.device == "cuda" else None

    def _tokens(self) -> Any:
        return self.torch.from_numpy(token_ids(self.job, self.model.config)).to(self.device)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
