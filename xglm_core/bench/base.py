"""What engines share: a model that is loaded once, or again and again; and the command line."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.backends import BACKENDS, load_backend
from xglm_core.bench.cases import NO_SUCH_CASE, Job, Run
from xglm_core.checkpoint.formats import present_formats
from xglm_core.errors import BackendError

_CLI = "import sys; from xglm_core.cli import main; sys.exit(main())"


class Engine:
    """An engine has a method for each case that it knows; it prepares the case."""

    def __init__(self, job: Job) -> None:
        float32_alone = job.engine in ("hf-tf", "hf-flax", "openvino") and job.dtype != "float32"
        if float32_alone or (job.quantization and job.engine not in (*BACKENDS, "ct2")):
            raise BackendError(NO_SUCH_CASE)
        self.job = job

    @functools.cached_property
    def model(self) -> Any:
        """The model."""
        return self.loaded()

    def loaded(self, **options: Any) -> Any:
        """The model of a backend, fresh from its files."""
        backend, dtype = BACKENDS[self.job.engine], self.job.dtype
        options |= {"dtype": dtype, "param_dtype": dtype} if backend.name == "flax" else {"dtype": dtype}
        if self.job.quantization and self.job.case.startswith("load-bin"):  # Other cases load a file of int8.
            options["quantization"] = self.job.quantization
        return getattr(load_backend(backend.name), backend.causal_lm).from_pretrained(self.job.checkpoint, **options)

    def load(self) -> Run:
        """Loads the model, and reads all weights."""
        return self.reading(lambda: self.read_weights(self.loaded()), weights_file(self.job.checkpoint))

    def read_weights(self, model: Any) -> None:
        """Reads all weights, as some may be views of the file."""
        raise NotImplementedError

    def reading(self, run: Any, file: Path) -> Run:
        """A run before which the system forgets a file's pages, or has read them."""
        return Run(run, before=functools.partial(forget if self.job.case.endswith("cold") else read, file))

    def start(self) -> Run:
        """Starts `xglm generate`; after its one token it ends the line."""
        options = ["--max-new-tokens", "1", "--backend", self.job.engine, "--dtype", self.job.dtype]
        return started([sys.executable, "-c", _CLI, "generate", self.job.checkpoint, "The", *options])


def started(command: list[str]) -> Run:
    """Starts a command, until it has printed a line; its end is waited for, but not timed."""
    processes: list[subprocess.Popen[str]] = []

    def run() -> None:
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        processes[0].stdout.readline()  # type: ignore[union-attr]

    def before() -> None:
        while processes:
            process = processes.pop()
            errors = process.communicate()[1].splitlines()
            if process.returncode:
                raise BackendError(errors[-1] if errors else f"it ended with code {process.returncode}")

    return Run(run, before=before)


def weights_file(folder: str | Path) -> Path:
    """The file with the weights of a folder."""
    return Path(folder) / present_formats(os.listdir(folder))[0].file


def read(file: Path) -> None:
    """Reads a file into memory."""
    np.fromfile(file, np.uint8)


def forget(file: Path) -> None:
    """Drops the pages of a file that the system keeps in memory."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
