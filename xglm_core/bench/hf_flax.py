"""The peer transformers 4, its model in Flax: what it does beside our training and generation."""

from __future__ import annotations

from typing import Any

from xglm_core.bench import flax
from xglm_core.bench.cases import Run

PACKAGES = ("transformers", "jax", "flax")


class Engine(flax.Engine):
    """Runs the cases."""

    load = start = prefill = score = loss = None  # type: ignore[assignment]

    def loaded(self, **options: Any) -> Any:
        """The model, fresh from its files."""
        from transformers import FlaxXGLMForCausalLM

        return FlaxXGLMForCausalLM.from_pretrained(self.job.checkpoint, from_pt=True)

    def train(self) -> Run:
        """Loss and gradients."""
        jax = self.jax

        def loss(params: Any, ids: Any, key: Any) -> Any:
            mask = jax.numpy.ones_like(ids)
            logits = self.model(ids, attention_mask=mask, params=params, dropout_rng=key, train=True).logits[:, :-1]
            return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1).mean()

        return self.steps(loss, self.model.params, self._tokens())
