"""The peer transformers 4, its model in TensorFlow: what it does beside our training and generation."""

from __future__ import annotations

import os
from typing import Any

from xglm_core.bench import core, tf
from xglm_core.bench.cases import Job

PACKAGES = ("transformers", "tensorflow", "tensorflow-cpu", "tf_keras")


def prepare(job: Job) -> None:
    """Writes `pytorch_model.bin`: this model cannot read `model.safetensors`."""
    core.written(job, "torch")


class Engine(tf.Engine):
    """Runs the cases."""

    load = start = prefill = score = loss = None  # type: ignore[assignment]

    def __init__(self, job: Job) -> None:
        os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
        super().__init__(job)

    def loaded(self, **options: Any) -> Any:
        """The model, fresh from its files; it generates compiled by XLA, as its documentation advises."""
        from transformers import TFXGLMForCausalLM

        model = TFXGLMForCausalLM.from_pretrained(core.written(self.job, "torch"), from_pt=True)
        model.generate = self.tf.function(model.generate, jit_compile=True)
        return model
