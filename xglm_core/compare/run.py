"""Runs jobs in the backends, each backend in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from xglm_core.backends import BACKENDS, require_frameworks
from xglm_core.compare.worker import JOBS_FILE, OUTCOME_FILE, Job, array_file
from xglm_core.errors import BackendError, XGLMError

# Defaults for the workers' environment. The tolerances are for float32 on a CPU; on a GPU, TensorFlow would compute
# float32 matrix products with 10-bit mantissas.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

_KILLED = -9  # The exit code of a process that received SIGKILL.


@dataclass(frozen=True, eq=False)
class Result:
    """The results of one job in one backend. The arrays are mapped files.

    Attributes:
        logits: the logits of the full pass, float32 [batch, length, vocab_size].
        hidden_states: float32 [num_layers + 1, batch, length, d_model].
        cached: the logits of the pass that ends token by token, like `logits`.
        chunked: the logits of the pass in chunks, like `logits`.
        generated: ids [batch, length + new]; None if not requested.
        seconds: the time for loading the checkpoint, compilation and all passes.
    """

    logits: np.ndarray
    hidden_states: np.ndarray
    cached: np.ndarray
    chunked: np.ndarray
    generated: np.ndarray | None
    seconds: float


@dataclass(frozen=True, eq=False)
class BackendRun:
    """The results of one backend.

    Attributes:
        versions: the versions of its frameworks, by name.
        results: one result for each job.
    """

    versions: dict[str, str]
    results: list[Result]


def installed_backends() -> tuple[list[str], list[str]]:
    """The installed backends, and for each of the others a line that says what is missing."""
    installed, missing = [], []
    for backend in BACKENDS:
        try:
            require_frameworks(backend)
            installed.append(backend)
        except BackendError as error:
            missing.append(str(error))
    return installed, missing


def parse_backends(names: str) -> list[str]:
    """The backends in a comma-separated list, without repetitions.

    Raises:
        BackendError: a backend does not exist or is not installed.
    """
    backends = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for backend in backends:
        require_frameworks(backend)
    return backends


def run_backend(backend: str, jobs: Sequence[Job], folder: Path) -> BackendRun:
    """Runs the jobs in a process of its own.

    Args:
        backend: "torch", "tf" or "flax".
        jobs: what to compute.
        folder: the folder for files, which must exist while the results are used; each backend has a subfolder.

    Raises:
        XGLMError: a checkpoint or an input is at fault, or the backend cannot run here.
        RuntimeError: the backend failed; the message ends with its traceback.
    """
    folder = folder / backend
    folder.mkdir()
    (folder / JOBS_FILE).write_text(json.dumps([asdict(job) for job in jobs]))
    process = subprocess.run(
        [sys.executable, "-P", "-m", "xglm_core.compare.worker", backend, str(folder)],
        # The worker imports from where this process does, not from the user's current folder.
        env={**_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if process.returncode == _KILLED:
        raise BackendError(f"the {backend} process was killed, as happens when memory runs out; give it fewer tokens")
    if process.returncode:
        raise RuntimeError(f"the {backend} backend failed:\n{process.stderr}")
    outcome = json.loads((folder / OUTCOME_FILE).read_text())
    if "error" in outcome:
        raise XGLMError(f"{backend}: {outcome['error']}")
    results = [
        _read_result(folder, index, job, seconds)
        for index, (job, seconds) in enumerate(zip(jobs, outcome["seconds"], strict=True))
    ]
    return BackendRun(outcome["versions"], results)


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Shows a line on stderr until the block ends; only if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _read_result(folder: Path, index: int, job: Job, seconds: float) -> Result:
    def load(name: str) -> np.ndarray:
        array: np.ndarray = np.load(array_file(folder, index, name), mmap_mode="r")
        return array

    return Result(
        load("logits"),
        load("hidden_states"),
        load("cached"),
        load("chunked"),
        load("generated") if job.new_tokens else None,
        seconds,
    )
