"""The peer transformers, its model in PyTorch and its tokenizer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from xglm_core.bench import core, torch
from xglm_core.bench.cases import Run

PACKAGES = ("transformers", "torch")


class Engine(torch.Engine):
    """Runs the cases."""

    start = None  # type: ignore[assignment]

    def loaded(self, **options: Any) -> Any:
        """The model, fresh from its files."""
        from transformers import XGLMForCausalLM

        dtype = getattr(self.torch, self.job.dtype)
        return XGLMForCausalLM.from_pretrained(self.job.checkpoint, torch_dtype=dtype).eval().to(self.device)

    def last_logits(self, tokens: Any) -> Any:
        """[rows, vocab_size]; older versions make all logits."""
        kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        return self.model(tokens, **kept).logits[:, -1]

    def scores(self, tokens: Any) -> Any:
        """[rows, length - 1]."""
        with self.torch.inference_mode():
            scores = self.model(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            return scores.gather(-1, tokens[:, 1:, None])[..., 0]

    def loss_of(self, states: Any, head: Any, labels: Any) -> Any:
        """The mean loss, of all logits."""
        functional = self.torch.nn.functional
        logits = functional.linear(states, head)[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    def tokenize(self) -> Run:
        """Encodes lines of the corpus."""
        from transformers import XGLMTokenizer

        tokenizer = XGLMTokenizer.from_pretrained(Path(self.job.vocabulary).parent)
        return core.tokenize(self.job, tokenizer.encode, lambda lines: tokenizer(lines)["input_ids"])
