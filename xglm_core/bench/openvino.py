"""The peer OpenVINO: graphs of transformers' PyTorch weights, with fixed shapes.

Its time for `decode` is a lower bound: the prompt once, then as many steps over keys and values of the middle length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.bench import base
from xglm_core.bench.cases import CASES, NO_SUCH_CASE, Job, Run, token_ids
from xglm_core.config import XGLMConfig
from xglm_core.errors import BackendError

PACKAGES = ("openvino",)


def prepare(job: Job) -> None:
    """Writes the graphs of a case, once for each shape."""
    graphs = {"prefill": ["prefill"], "score": ["score"], "decode": ["prefill", "step"]}
    for name in graphs[CASES[job.case].method]:
        if not _is_other(job) and not _file(job, name).exists():
            _write(job, name)


class Engine(base.Engine):
    """Runs the cases."""

    load = start = None  # type: ignore[assignment]

    def __init__(self, job: Job) -> None:
        import openvino

        if _is_other(job):
            raise BackendError(NO_SUCH_CASE)
        super().__init__(job)
        self.core, self.config = openvino.Core(), XGLMConfig.from_pretrained(job.checkpoint)
        self.ids = token_ids(job, self.config)

    def prefill(self) -> Run:
        """The last logits."""
        first = self._compiled("prefill")
        return Run(lambda: first([self.ids]))

    def score(self) -> Run:
        """The log-probabilities of the tokens."""
        scores = self._compiled("score")
        return Run(lambda: scores([self.ids]))

    def decode(self) -> Run:
        """A lower bound, see above."""
        first, step = self._compiled("prefill"), self._compiled("step")
        given = _step_inputs(self.job, self.config)

        def run() -> None:
            first([self.ids])
            for _ in range(self.job.new - 1):
                step(given)

        return Run(run, lambda: first([self.ids]))

    def _compiled(self, name: str) -> Any:
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        return self.core.compile_model(self.core.read_model(_file(self.job, name)), "CPU", hint)


def _is_other(job: Job) -> bool:
    """Whether rows have different lengths, or weights are not float32."""
    return job.case == "decode-prompts" or bool(job.quantization) or job.dtype != "float32" or job.device != "cpu"


def _file(job: Job, name: str) -> Path:
    shape = f"{job.rows}x{job.length}+{job.new}" if name == "step" else f"{job.rows}x{job.length}"
    return Path(job.work) / f"{Path(job.checkpoint).name}-openvino-{name}-{shape}.xml"


def _step_inputs(job: Job, config: XGLMConfig) -> list[np.ndarray]:
    """Ids, positions, keys and values of the middle step."""
    past, width = job.length + job.new // 2, config.d_model // config.attention_heads
    keys = np.zeros((config.num_layers, job.rows, config.attention_heads, past, width), np.float32)
    return [token_ids(job, config)[:, :1].copy(), np.full((job.rows, 1), past), keys, keys]


def _write(job: Job, name: str) -> None:
    import openvino
    import torch
    import transformers

    model = transformers.XGLMForCausalLM.from_pretrained(job.checkpoint).eval()
    config = XGLMConfig.from_pretrained(job.checkpoint)

    class Prefill(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any) -> Any:
            return model.lm_head(self.states(ids)[:, -1])

        def states(self, ids: Any) -> Any:
            return model.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state

    class Score(Prefill):
        def forward(self, ids: Any) -> Any:
            logits = model.lm_head(self.states(ids)[:, :-1])
            return logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)

    class Step(Prefill):
        def forward(self, ids: Any, positions: Any, past_keys: Any, past_values: Any) -> Any:  # type: ignore[override]
            rows, keys, values = ids.shape[0], [], []
            states = model.model.embed_tokens(ids) + model.model.embed_positions.weights[positions + 2]
            for index, block in enumerate(model.model.layers):
                attention, normed = block.self_attn, block.self_attn_layer_norm(states)
                query, key, value = (
                    layer(normed).view(rows, 1, config.attention_heads, -1).transpose(1, 2)
                    for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                keys.append(key)
                values.append(value)
                found = torch.nn.functional.scaled_dot_product_attention(
                    query, torch.cat([past_keys[index], key], 2), torch.cat([past_values[index], value], 2)
                )
                states = states + attention.out_proj(found.transpose(1, 2).reshape(rows, 1, -1))
                states = states + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(states))))
            chosen = model.lm_head(model.model.layer_norm(states))[:, -1].argmax(-1)
            return chosen, torch.stack(keys), torch.stack(values)

    graph = {"prefill": Prefill, "score": Score, "step": Step}[name]()
    arrays = _step_inputs(job, config) if name == "step" else [token_ids(job, config)]
    examples = tuple(map(torch.from_numpy, arrays))
    with torch.inference_mode():
        converted = openvino.convert_model(graph, example_input=examples, input=[example.shape for example in examples])
    openvino.save_model(converted, _file(job, name), compress_to_fp16=False)
