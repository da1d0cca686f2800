"""Which library computes the float32 products of linear layers on an x86 CPU: MKL, as PyTorch does, or oneDNN.

No rule says which is the faster one: it depends on the processor, and on how many rows there are. So each kind of
product is measured before it is first needed, on matrices that no cache holds, and the results are kept in a file. The
two libraries differ in the last bits: with the file, or with `XGLM_PRODUCTS=mkl` or `onednn` in the environment, which
decides without measuring, a program computes the same bits each time. See docs/numerics.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_KINDS = {"one row": 1, "few rows": 8, "many rows": 256}  # And how many rows each is measured with.
_FEW = 32
_WIDTH, _HEIGHT, _MATRICES = 1024, 4096, 8  # Matrices of 16 MB, and enough of them to leave the cache.
_SMALL = 2**18  # Elements of a matrix so small that the choice does not matter.
_MARGIN = 0.9  # oneDNN is taken if it needs at most so much of MKL's time.


@functools.lru_cache(4096)
def takes_onednn(rows: int, elements: int) -> bool:
    """Whether a product of so many rows, with a matrix of so many elements, goes to oneDNN."""
    asked = os.environ.get("XGLM_PRODUCTS", "")
    if asked or elements < _SMALL:
        return asked == "onednn"
    return _ratio("one row" if rows == 1 else "few rows" if rows <= _FEW else "many rows") <= _MARGIN


@functools.cache
def _ratio(kind: str) -> float:
    """The time of oneDNN in units of MKL's: from the file, or measured and written there.

    The file is {processor, threads and PyTorch: {kind: ratio}}. If it cannot be written, each process measures.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xglm" / "products.json"
    machine = f"{_processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    kept: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = dict(json.loads(path.read_text()))
    found = kept.setdefault(machine, {})
    if kind not in found:
        found[kind] = _measured(_KINDS[kind])
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(kept, indent=1))
            new.replace(path)
    return found[kind]


@torch.inference_mode()
def _measured(rows: int) -> float:
    """The quotient of the best of three times, taken in turn."""
    states, weights = torch.ones(rows, _WIDTH), torch.ones(_MATRICES if rows <= _FEW else 1, _HEIGHT, _WIDTH)
    best: dict[Any, float] = {}
    for turn in range(4):  # The first one prepares.
        for product in (F.linear, _onednn):
            start = time.perf_counter()
            for weight in weights:
                product(states, weight)
            if turn:
                best[product] = min(time.perf_counter() - start, best.get(product, float("inf")))
    return round(best[_onednn] / best[F.linear], 2)


def _onednn(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()
