"""Which library computes the float32 products of linear layers on an x86 CPU: MKL, as PyTorch does, or oneDNN.

oneDNN has two forms for few rows: as it is, and with the factors in the other order.

No rule says which is the faster one: it depends on the processor, and on how many rows there are. So each kind of
product is measured before it is first needed, on matrices that no cache holds, and the results are kept in a file. The
results differ in the last bits: with the file, or with `XGLM_PRODUCTS=mkl`, `onednn` or `turned` in the environment,
which decides without measuring, a program computes the same bits each time. See docs/numerics.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

_FEW = 32
_WIDTH, _HEIGHT, _MATRICES = 1024, 4096, 8  # Matrices of 16 MB, and enough of them to leave the cache.
_SMALL = 2**18  # Elements of a matrix so small that the choice does not matter.
_MARGIN = 0.9  # The other form is taken if it needs at most so much of the usual one's time.


@functools.lru_cache(4096)
def takes_onednn(rows: int, elements: int) -> bool:
    """Whether a product of so many rows, with a matrix of so many elements, goes to oneDNN."""
    asked = os.environ.get("XGLM_PRODUCTS", "")
    if asked or elements < _SMALL:
        return asked in ("onednn", "turned")
    return _ratio("one row" if rows == 1 else "few rows" if rows <= _FEW else "many rows") <= _MARGIN


@functools.lru_cache(4096)
def takes_turned(rows: int, height: int, width: int) -> bool:
    """Whether oneDNN is to compute a product of so many rows, with a matrix [height, width], by `turned`."""
    asked = os.environ.get("XGLM_PRODUCTS", "")
    if not 1 < rows <= _FEW or height < width or (height * width < _SMALL and not asked):
        return False
    return asked == "turned" if asked else _ratio("few rows, turned") <= _MARGIN


def onednn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, computed by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def turned(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`onednn` with the factors in the other order: the many rows of the matrix are those of the product."""
    # Contiguous: of a second factor with gaps, oneDNN's product is a hundred times slower.
    product = onednn(weight, states.reshape(-1, states.shape[-1]).contiguous()).T.contiguous()
    if bias is not None:
        product += bias
    return product.view(*states.shape[:-1], len(weight))


# The rows that each kind of product is measured with, the usual form and the other one.
_KINDS = {
    "one row": (1, F.linear, onednn),
    "few rows": (8, F.linear, onednn),
    "few rows, turned": (8, onednn, turned),
    "many rows": (256, F.linear, onednn),
}


@functools.cache
def _ratio(kind: str) -> float:
    """The time of the other form in units of the usual one's: from the file, or measured and written there.

    The file is {processor, threads and PyTorch: {kind: ratio}}. If it cannot be written, each process measures.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xglm" / "products.json"
    machine = f"{_processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    kept: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = dict(json.loads(path.read_text()))
    found = kept.setdefault(machine, {})
    if kind not in found:
        found[kind] = _measured(*_KINDS[kind])
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(kept, indent=1))
            new.replace(path)
    return found[kind]


@torch.inference_mode()
def _measured(rows: int, *forms: Callable[..., torch.Tensor]) -> float:
    """The quotient of the best of three times, taken in turn: that of the second form by that of the first."""
    states, weights = torch.ones(rows, _WIDTH), torch.ones(_MATRICES if rows <= _FEW else 1, _HEIGHT, _WIDTH)
    best = [float("inf")] * 2
    for turn in range(4):  # The first one prepares.
        for index, form in enumerate(forms):
            start = time.perf_counter()
            for weight in weights:
                form(states, weight)
            if turn:
                best[index] = min(time.perf_counter() - start, best[index])
    return round(best[1] / best[0], 2)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()
