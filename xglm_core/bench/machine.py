"""What a measurement depends on: the machine, the versions, and how fast the machine reads and multiplies."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core import __version__

_READ_BYTES = 2**28  # For each thread: more than any cache holds.
_WIDTH = 4096
_REPEATS = 3


def threads() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stamp() -> dict[str, Any]:
    """Processor, cores, threads, the versions of Python, numpy and this package, and the commit of its sources."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {"cpu": names[0] if names else platform.processor() or platform.machine()}
    found |= {"cores": os.cpu_count(), "threads": threads(), "system": platform.platform(terse=True)}
    found["versions"] = {"xglm": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return found | {"commit": _commit(), "date": time.strftime("%Y-%m-%d")}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def limits(device: str) -> dict[str, float]:
    """What the device reached in a process of its own: GB/s that it read, and GFLOP/s of float32 matrix products.

    On a GPU PyTorch measures; without it, the result is empty.
    """
    command = [sys.executable, "-c", "from xglm_core.bench.machine import main; main()", device]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, float] = json.loads(output)
    return found


def main() -> None:
    """Measures and prints the limits of a device."""
    found = _cpu() if sys.argv[1] == "cpu" else _gpu()
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def resident(which: str) -> float:
    """The resident memory of this process [MB of 10^6]: "VmRSS" that of now, "VmHWM" the largest; 0 if unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{which}:"))


def _commit() -> str | None:
    """The commit of the sources, with "+" if they have changed since; None if they are not a Git repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"]
        return subprocess.run(described, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _best(run: Callable[[], object]) -> float:
    """The seconds of the fastest of some calls, after one that is not counted."""
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _cpu() -> dict[str, float]:
    arrays = [np.ones(_READ_BYTES // 8) for _ in range(threads())]
    with ThreadPoolExecutor(len(arrays)) as pool:
        reading = _best(lambda: list(pool.map(np.max, arrays)))
    square = np.random.default_rng(0).standard_normal((_WIDTH // 2, _WIDTH // 2), np.float32)
    multiplying = _best(lambda: square @ square)
    return {
        "read_gb_s": len(arrays) * _READ_BYTES / reading / 1e9,
        "float32_gflop_s": 2 * len(square) ** 3 / multiplying / 1e9,
    }


def _gpu() -> dict[str, float]:
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    values, square = torch.ones(2**30, device="cuda"), torch.randn(_WIDTH, _WIDTH, device="cuda")
    reading = _best(lambda: float(values.max()))
    multiplying = _best(lambda: float((square @ square)[0, 0]))
    return {
        "read_gb_s": values.nbytes / reading / 1e9,
        "float32_gflop_s": 2 * _WIDTH**3 / multiplying / 1e9,
    }
