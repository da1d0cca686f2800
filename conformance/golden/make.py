"""Computes the golden numbers with transformers: `make golden`, or `python -m conformance.golden.make`."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
import transformers

from conformance.cases import CASES, Case
from conformance.golden import (
    GREEDY_CASE,
    NEW_TOKENS,
    Golden,
    case_digest,
    golden_path,
    kept_columns,
    kept_positions,
)
from conformance.random_weights import write_checkpoint
from xglm_core.positions import position_table


def main() -> None:
    """Writes the file of each case."""
    for case in CASES:
        golden = compute(case)
        fields = {name: value for name, value in vars(golden).items() if value is not None}
        np.savez_compressed(golden_path(case), **fields)
        print(f"{case.name}: {golden_path(case).stat().st_size} bytes, table error {golden.table_error:.1e}")


def compute(case: Case) -> Golden:
    """Runs one case through a checkpoint folder, as a user of transformers would."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, case.config, case.seed)
        model = transformers.XGLMForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
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
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}",
        greedy=greedy,
    )


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
