"""Computes the golden numbers with transformers: `make golden`, or `python -m conformance.golden.make`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import transformers

from conformance.calls import CALL_CASES, CallCase
from conformance.cases import CASES, Case
from conformance.generation import CONFIG, GENERATE_CASES, SEEDS, GenerateCase, prompts
from conformance.golden import (
    CALLS_PATH,
    GENERATE_PATH,
    GREEDY_CASE,
    NEW_TOKENS,
    Golden,
    call_digest,
    call_numbers,
    case_digest,
    generate_digest,
    golden_path,
    kept_columns,
    kept_positions,
)
from conformance.random_weights import write_checkpoint
from xglm_core.config import XGLMConfig
from xglm_core.positions import position_table


def main() -> None:
    """Writes the file of each case, and one for all calls."""
    for case in CASES:
        golden = compute(case)
        fields = {name: value for name, value in vars(golden).items() if value is not None}
        np.savez_compressed(golden_path(case), **fields)
        print(f"{case.name}: {golden_path(case).stat().st_size} bytes, table error {golden.table_error:.1e}")
    calls = {f"{case.name}/{key}": value for case in CALL_CASES for key, value in compute_call(case).items()}
    np.savez_compressed(CALLS_PATH, **calls)
    print(f"calls: {CALLS_PATH.stat().st_size} bytes")
    texts: dict[str, Any] = {
        f"{case.name}/{seed}": compute_text(case, seed) for seed in SEEDS for case in GENERATE_CASES
    }
    np.savez_compressed(GENERATE_PATH, **texts, digest=generate_digest(), versions=_versions())
    print(f"generate: {GENERATE_PATH.stat().st_size} bytes")


def compute(case: Case) -> Golden:
    """Runs one case through a checkpoint folder, as a user of transformers would."""
    model = _model(case.config, case.seed)
    inputs = _inputs(case)
    positions, columns = kept_positions(case.input_ids.shape[1]), kept_columns(case.config.vocab_size)
    table = model.model.embed_positions.weights.numpy()
    with torch.inference_mode():
        logits = model(**inputs, position_ids=_position_ids(case)).logits.numpy()
        is_greedy = case.name == GREEDY_CASE
        greedy = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS).numpy() if is_greedy else None
    return Golden(
        logits=logits[:, positions][:, :, columns],
        positions=positions,
        columns=columns,
        table_error=float(np.abs(table - position_table(case.config)).max()),
        digest=case_digest(case),
        versions=_versions(),
        greedy=greedy,
    )


def compute_call(case: CallCase) -> dict[str, Any]:
    """Runs one call, forth and, if there are labels, back."""
    model = _model(case.config, case.seed)
    # Copies, as transformers adds 2 to the position_ids in place.
    arguments = {name: torch.tensor(array) for name, array in case.arguments.items()}
    leaves = dict(model.named_parameters())
    for name in ("inputs_embeds", "encoder_hidden_states"):
        if name in arguments:
            leaves[name] = arguments[name].requires_grad_()
    output = model(**arguments, use_cache=False, output_attentions=True, output_hidden_states=True)
    gradients = {}
    if output.loss is not None:
        output.loss.backward()
        gradients = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    numbers = call_numbers(
        case,
        output.logits.detach().numpy(),
        _arrays(output.hidden_states),
        _arrays(output.attentions),
        _arrays(output.cross_attentions or ()),
        None if output.loss is None else output.loss.item(),
        gradients,
    )
    return {**numbers, "digest": call_digest(case), "versions": _versions()}


def compute_text(case: GenerateCase, seed: int) -> np.ndarray:
    """What transformers generates: int64 [rows, prompt + new]."""
    model, (ids, mask) = _model(CONFIG, seed), prompts(seed)
    options = {name: value for name, value in case.options.items() if value is not None}
    if not case.alone:
        output = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options)
        return np.asarray(output)
    rows = []
    for row, keep in zip(ids, mask == 1, strict=True):
        for text in model.generate(torch.from_numpy(row[keep])[None], **options).tolist():
            rows.append([*row[~keep].tolist(), *text])
    longest = max(map(len, rows))
    return np.array([row + [CONFIG.pad_token_id] * (longest - len(row)) for row in rows])


def _model(config: XGLMConfig, seed: int) -> Any:
    """The model of a random checkpoint, loaded as a user of transformers would."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, config, seed)
        model = transformers.XGLMForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def _versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"


def _arrays(tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def _inputs(case: Case) -> dict[str, Any]:
    mask = None if case.attention_mask is None else torch.from_numpy(case.attention_mask)
    return {"input_ids": torch.from_numpy(case.input_ids), "attention_mask": mask}


def _position_ids(case: Case) -> torch.Tensor | None:
    """Positions that follow the mask; transformers derives them in `generate` only, not in `forward`."""
    if case.attention_mask is None:
        return None
    return torch.from_numpy(np.maximum(case.attention_mask.cumsum(axis=1) - 1, 0))


if __name__ == "__main__":
    main()
