"""The peer CTranslate2. Its converters know no XGLM, so that its specification of a decoder is filled here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.bench import base
from xglm_core.bench.cases import Job, Run, count_new, prompts, token_ids
from xglm_core.bench.machine import threads
from xglm_core.checkpoint.dtypes import DTYPES
from xglm_core.checkpoint.folder import open_checkpoint
from xglm_core.config import XGLMConfig
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_core.weight_names import EMBEDDING

PACKAGES = ("ctranslate2",)
_ACTIVATIONS = {"gelu": "GELU", "gelu_new": "GELUTanh", "relu": "RELU", "silu": "SWISH"}


def prepare(job: Job) -> None:
    """Writes the model folder, once for all cases."""
    import ctranslate2.specs as specs

    if _folder(job).exists():
        return
    checkpoint = open_checkpoint(job.checkpoint)
    config, activation = checkpoint.config, _ACTIVATIONS[str(checkpoint.config.activation_function)]
    model = specs.TransformerDecoderModelSpec.from_config(
        config.num_layers,
        config.attention_heads,
        pre_norm=True,
        activation=getattr(specs.common_spec.Activation, activation),
    )

    def read(name: str) -> np.ndarray:
        return np.array(checkpoint.read(name, DTYPES["float32"]))

    def fill_linear(layer: Any, *names: str) -> None:
        layer.weight = np.concatenate([read(f"{name}.weight") for name in names])
        layer.bias = np.concatenate([read(f"{name}.bias") for name in names])

    def fill_norm(layer: Any, name: str) -> None:
        layer.gamma, layer.beta = read(f"{name}.weight"), read(f"{name}.bias")

    decoder = model.decoder
    decoder.scale_embeddings = config.scale_embedding
    decoder.embeddings.weight = decoder.projection.weight = read(EMBEDDING)
    decoder.position_encodings.encodings = position_table(config)[POSITION_OFFSET:]
    fill_norm(decoder.layer_norm, "model.layer_norm")
    for index, block in enumerate(decoder.layer):
        name = f"model.layers.{index}"
        fill_norm(block.self_attention.layer_norm, f"{name}.self_attn_layer_norm")
        fill_linear(block.self_attention.linear[0], *(f"{name}.self_attn.{which}_proj" for which in "qkv"))
        fill_linear(block.self_attention.linear[1], f"{name}.self_attn.out_proj")
        fill_norm(block.ffn.layer_norm, f"{name}.final_layer_norm")
        fill_linear(block.ffn.linear_0, f"{name}.fc1")
        fill_linear(block.ffn.linear_1, f"{name}.fc2")
    model.register_vocabulary([f"t{token}" for token in range(config.vocab_size)])
    model.config.bos_token, model.config.eos_token, model.config.unk_token = "t0", "t2", "t3"
    model.validate()
    model.optimize(quantization=_type(job) if job.quantization else None)
    _folder(job).mkdir()
    model.save(str(_folder(job)))


class Engine(base.Engine):
    """Runs the cases."""

    start = None  # type: ignore[assignment]

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.config = XGLMConfig.from_pretrained(job.checkpoint)

    def loaded(self, **options: Any) -> Any:
        """The model, fresh from its files."""
        from ctranslate2 import Generator

        device = "cuda" if self.job.device == "gpu" else "cpu"
        return Generator(str(_folder(self.job)), device=device, compute_type=_type(self.job), intra_threads=threads())

    def load(self) -> Run:
        """Its own file, into memory of its own."""
        return self.reading(self.loaded, _folder(self.job) / "model.bin")

    def prefill(self) -> Run:
        """One token, which needs the last logits alone."""
        tokens = self._named(token_ids(self.job, self.config))
        return Run(lambda: self._generate(tokens, 1, []))

    def score(self) -> Run:
        """The log-probabilities of the tokens."""
        tokens = self._named(token_ids(self.job, self.config))
        return Run(lambda: self.model.score_batch(tokens))

    def decode(self) -> Run:
        """Greedy."""
        ids, mask, ends = prompts(self.job, self.config)
        tokens = self._named(row[kept > 0] for row, kept in zip(ids, mask, strict=True))
        return Run(
            lambda: count_new(self._generate(tokens, self.job.new, ends), ends), lambda: self._generate(tokens, 1, ends)
        )

    def _generate(self, tokens: list[list[str]], new: int, ends: list[int]) -> list[Any]:
        options = {"end_token": ends, "return_end_token": True} if ends else {"min_length": new}
        results = self.model.generate_batch(
            tokens, max_length=new, sampling_topk=1, include_prompt_in_result=False, **options
        )
        return [result.sequences_ids[0] for result in results]

    def _named(self, rows: Any) -> list[list[str]]:
        assert self.model is not None  # It is loaded now, not in the first run.
        return [[f"t{token}" for token in row] for row in rows]


def _type(job: Job) -> str:
    return f"int8_{job.dtype}" if job.quantization else job.dtype


def _folder(job: Job) -> Path:
    return Path(job.work) / f"{Path(job.checkpoint).name}-ct2{'-int8' if job.quantization else ''}"
