"""One backend in a process of its own: `python -m xglm_core.compare.worker BACKEND FOLDER`.

Three frameworks in one process would share threads, memory and environment variables. The folder holds `jobs.json`. The
worker adds a `.npy` file for each array of each job, which the parent maps into memory. At the end it writes
`outcome.json`: the frameworks' "versions" and the "seconds" of each job, or the "error" that the input caused.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.backends import BACKENDS, load_backend
from xglm_core.compare.adapters import BackendModel
from xglm_core.errors import XGLMError

JOBS_FILE = "jobs.json"
OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class Job:
    """A checkpoint, an input and what to compute; plain values that are sent as JSON.

    Attributes:
        checkpoint: the folder.
        input_ids: [batch][length].
        attention_mask: 1 for tokens, 0 for padding [batch][length]; None passes none.
        chunks: the lengths of the pieces of the chunked pass.
        new_tokens: the largest number of tokens to generate; 0 for none.
        weights: the format to read; see `open_checkpoint`.
    """

    checkpoint: str
    input_ids: list[list[int]]
    attention_mask: list[list[int]] | None
    chunks: list[int]
    new_tokens: int = 0
    weights: str | None = None


def array_file(folder: Path, job: int, name: str) -> Path:
    """The file for "logits", "hidden_states" (stacked), "cached", "chunked" or "generated" of a job."""
    return folder / f"{job}-{name}.npy"


def run_jobs(backend: str, folder: Path) -> dict[str, Any]:
    """Runs all jobs and writes their arrays; returns the outcome.

    Raises:
        XGLMError: a checkpoint or an input is at fault.
    """
    load_backend(backend)  # Now, so that the first job's time does not include it.
    seconds = []
    for index, entry in enumerate(json.loads((folder / JOBS_FILE).read_text())):
        begin = time.perf_counter()
        for name, array in _arrays(backend, Job(**entry)):
            np.save(array_file(folder, index, name), array)
        seconds.append(time.perf_counter() - begin)
    versions = {name: importlib.import_module(name).__version__ for name in BACKENDS[backend].frameworks}
    return {"versions": versions, "seconds": seconds}


def _arrays(backend: str, job: Job) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the results of a job by name, one at a time: with 256,008 logits per position they are large."""
    model = BackendModel(backend, job.checkpoint, job.weights)
    input_ids = np.array(job.input_ids, np.int64)
    mask = None if job.attention_mask is None else np.array(job.attention_mask, np.int64)
    logits, hidden_states = model.full(input_ids, mask)
    yield "logits", logits
    yield "hidden_states", np.stack(hidden_states)
    yield "cached", model.cached(input_ids, mask)
    yield "chunked", model.chunked(input_ids, mask, job.chunks)
    if job.new_tokens:
        yield "generated", model.generate(input_ids, mask, job.new_tokens)


def main(backend: str, folder: Path) -> None:
    """Runs the jobs in `folder` and writes the outcome."""
    try:
        outcome = run_jobs(backend, folder)
    except XGLMError as error:
        outcome = {"error": str(error)}
    (folder / OUTCOME_FILE).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
