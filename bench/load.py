"""How long a backend takes to load a checkpoint from the disk, beside reading its file into memory; and its peak.

    xglm bench make-checkpoint --size 564M random-564M
    python bench/load.py torch random-564M

Before each measurement the system forgets the file's pages. Loading lasts until every weight has been read, as some are
views of the file. The framework is imported, and has loaded a tiny model, before. The memory is the largest resident
set less that before the loading, in which mapped pages of the file count. Medians of `--runs`, on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from loss import resident
from speed import BACKENDS

from xglm_core.checkpoint.formats import FORMATS

SMALL = Path(__file__).resolve().parent.parent / "examples" / "tiny_model" / "checkpoint"


def forget(file: Path) -> None:
    """Drops the pages of a file that the system keeps in memory."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(backend: str, folder: Path) -> Any:
    """What keeps a model, all of whose weights have been read."""
    read_all = BACKENDS[backend]("load", str(folder), np.zeros((1, 1), np.int64))
    read_all()
    return read_all


def measure(backend: str, folder: Path) -> None:
    """One run in a process of its own: prints seconds and memory [MB]."""
    file = folder / FORMATS["safetensors"].file
    forget(file)
    begin = time.perf_counter()
    if backend == "reading":
        np.fromfile(file, np.uint8)
        print(json.dumps([time.perf_counter() - begin, 0]))
        return
    load(backend, SMALL)
    Path("/proc/self/clear_refs").write_text("5")  # The largest resident set is counted anew.
    before, begin = resident("VmRSS"), time.perf_counter()
    kept = load(backend, folder)
    print(json.dumps([time.perf_counter() - begin, resident("VmHWM") - before]))
    del kept


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=(*BACKENDS, "reading"))
    parser.add_argument("checkpoint", type=Path, help="folder with model.safetensors in one file")
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind, in turn (%(default)s)")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # This process is one of these runs.
    arguments = parser.parse_args()
    if arguments.once:
        measure(arguments.backend, arguments.checkpoint)
        return
    runs: dict[str, list[list[float]]] = {"reading": [], arguments.backend: []}
    for kind in [*runs] * arguments.runs:
        command = [sys.executable, __file__, kind, str(arguments.checkpoint), "--once"]
        runs[kind].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    reading = statistics.median(seconds for seconds, _ in runs["reading"])
    loading, memory = map(statistics.median, zip(*runs[arguments.backend], strict=True))
    numbers = {"reading_s": round(reading, 2), "loading_s": round(loading, 2), "ratio": round(loading / reading, 2)}
    size = (arguments.checkpoint / FORMATS["safetensors"].file).stat().st_size / 1e6
    print(json.dumps({"backend": arguments.backend, **numbers, "MB": round(memory), "file_MB": round(size)}))


if __name__ == "__main__":
    main()
