"""The peer that does the least: it reads the file, copies it, imports PyTorch."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from xglm_core.bench import base
from xglm_core.bench.cases import Run
from xglm_core.bench.core import written

PACKAGES = ("torch",)


class Engine(base.Engine):
    """Runs the cases."""

    def load(self) -> Run:
        """Reads the file into memory."""
        file = base.weights_file(self.job.checkpoint)
        return self.reading(lambda: base.read(file), file)

    def start(self) -> Run:
        """Imports PyTorch."""
        return base.started([sys.executable, "-c", "import torch; print()"])

    def convert(self) -> Run:
        """Copies the larger one of the two files, to the disk."""
        files = [base.weights_file(written(self.job, format)) for format in self.job.case.split("-")[1:]]
        larger, copy = max(files, key=lambda file: file.stat().st_size), Path(self.job.work) / "copy"

        def run() -> None:
            shutil.copyfile(larger, copy)
            with open(copy, "rb") as file:
                os.fsync(file.fileno())

        return Run(run, before=lambda: copy.unlink(missing_ok=True))
