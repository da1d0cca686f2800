"""Runs one checkpoint and one batch of prompts in several backends and in the oracle, for `xglm compare`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.checkpoint import Checkpoint
from xglm_core.compare.divergence import Parting, find_partings
from xglm_core.compare.oracle import checkpoint_reader, forward
from xglm_core.compare.quantized import Change, measure_change
from xglm_core.compare.report import Measurement, Tolerances, Worst, between_backends, measure
from xglm_core.compare.run import progress, run_backend
from xglm_core.compare.worker import Job
from xglm_core.config import XGLMConfig


@dataclass(frozen=True, eq=False)
class Comparison:
    """The results of the backends.

    Attributes:
        versions: the versions of the frameworks, by backend.
        measurements: the errors, by backend.
        between: the two backends that differ most; see `between_backends`.
        generated: ids [rows, length + new], by backend; empty if nothing was generated.
        partings: one for each row if ids were generated; see `find_partings`.
        failures: a line for each failure.
        changes: what int8 changes, by backend; empty if that was not asked for, or no text has two tokens.
    """

    versions: dict[str, dict[str, str]]
    measurements: dict[str, Measurement]
    between: tuple[Worst, tuple[str, str]] | None
    generated: dict[str, np.ndarray]
    partings: list[Parting | None]
    failures: list[str]
    changes: dict[str, Change]

    def numbers(self) -> dict[str, Any]:
        """All fields as plain values."""
        between = self.between and {"backends": self.between[1], **asdict(self.between[0])}
        return {
            "failures": self.failures,
            "versions": self.versions,
            "backends": {name: asdict(each) for name, each in self.measurements.items()},
            "between_backends": between,
            "generated": {name: ids.tolist() for name, ids in self.generated.items()},
            "partings": [parting and asdict(parting) for parting in self.partings],
            "changes": {name: {**asdict(each), "ratio": each.ratio} for name, each in self.changes.items()},
        }


def compare_backends(
    checkpoint: Checkpoint,
    config: XGLMConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    *,
    new_tokens: int,
    backends: Sequence[str],
    tolerances: Tolerances,
    floats: Checkpoint | None = None,
) -> Comparison:
    """Runs the oracle here, and each backend in a process of its own, one after another.

    Args:
        checkpoint: the weights.
        config: as planned for loading, see `plan_loading`.
        input_ids: prompts padded on the left, int64 [rows, length].
        attention_mask: 1 for tokens, 0 for padding, int64 [rows, length].
        new_tokens: the largest number of tokens to generate; 0 for none.
        backends: the names of the backends.
        tolerances: the largest errors that pass.
        floats: the weights of which those of `checkpoint` were made; for `Comparison.changes`.

    Raises:
        XGLMError: the checkpoint or the input is at fault, or a backend cannot run here.
        RuntimeError: a backend failed.
    """
    read = checkpoint_reader(checkpoint)
    with progress("oracle"):
        oracle = forward(config, read, input_ids, attention_mask)
        before = None
        if floats is not None:
            before = forward(config, checkpoint_reader(floats), input_ids, attention_mask).logits
    chunks = _unequal_chunks(input_ids.shape[1])
    job = Job(str(checkpoint.folder), input_ids.tolist(), attention_mask.tolist(), chunks, new_tokens)
    with tempfile.TemporaryDirectory(prefix="xglm-compare-") as folder:
        versions, results = {}, {}
        for backend in backends:
            with progress(backend):
                run = run_backend(backend, [job], Path(folder))
            versions[backend], results[backend] = run.versions, run.results[0]
        with progress("comparison"):
            real = attention_mask != 0
            generated = {name: np.array(each.generated) for name, each in results.items() if each.generated is not None}
            partings = find_partings(generated, attention_mask, config, read) if generated else []
            measurements = {name: measure(each, oracle, real, tolerances) for name, each in results.items()}
            changes = {
                name: change
                for name, each in results.items()
                if before is not None and (change := measure_change(each.logits, before, input_ids, real))
            }
            between = between_backends({name: each.logits for name, each in results.items()}, real)
    failures = [f"{name} {failure}" for name, each in measurements.items() for failure in each.failures]
    failures += [
        f"text {row + 1}: another new token {parting.token + 1}, and no tie: "
        f"the oracle's logits are {parting.margin:.1e} apart, tolerance {tolerances.logits:.0e}"
        for row, parting in enumerate(partings)
        if parting and parting.margin > tolerances.logits
    ]
    return Comparison(versions, measurements, between, generated, partings, failures, changes)


def _unequal_chunks(length: int) -> list[int]:
    """The lengths of three chunks: half of the positions, one position, and the rest."""
    half = length // 2
    return [chunk for chunk in (half, 1, length - half - 1) if chunk > 0]
