"""Measures the errors of a backend against the oracle, judges them, and formats them."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.compare.oracle import OracleOutput
from xglm_core.compare.run import Result


@dataclass(frozen=True)
class Tolerances:
    """The largest relative errors that pass, with their reasons in `tolerances.toml`."""

    logits: float
    hidden_states: float
    cached: float
    chunked: float
    golden: float


@dataclass(frozen=True)
class Worst:
    """The largest error of an array.

    Attributes:
        error: relative to the largest absolute value expected; infinite where a value is not finite.
        index: its row, position, and id or channel.
    """

    error: float
    index: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """How often the likeliest token is the oracle's.

    Attributes:
        positions: the number of positions that are not padding.
        ties: those with another token, whose logit by the oracle is within the tolerance of the largest.
        different: those with another token that the oracle finds clearly less likely.
    """

    positions: int
    ties: int
    different: int

    @property
    def percent(self) -> float:
        """The percentage of positions with the same likeliest token or a tie."""
        return 100 * (1 - self.different / self.positions)


@dataclass(frozen=True)
class Measurement:
    """One backend on one input.

    Attributes:
        logits, cached, chunked: the worst logit of the full, the cached and the chunked pass.
        layers: the worst value of each hidden state, from the embeddings to the final norm.
        argmax: the agreement of the full pass.
        seconds: see `Result`.
        failures: a line for each exceeded tolerance.
    """

    logits: Worst
    cached: Worst
    chunked: Worst
    layers: tuple[Worst, ...]
    argmax: Agreement
    seconds: float
    failures: tuple[str, ...]

    @property
    def worst_layer(self) -> int:
        """The index of the hidden state with the largest error."""
        return int(np.argmax([layer.error for layer in self.layers]))


def load_tolerances() -> Tolerances:
    """Reads `tolerances.toml`."""
    return Tolerances(**tomllib.loads(Path(__file__).with_name("tolerances.toml").read_text(encoding="utf-8")))


def measure(result: Result, oracle: OracleOutput, real: np.ndarray, tolerances: Tolerances) -> Measurement:
    """Compares a backend's results with the oracle.

    Args:
        result: the backend's arrays.
        oracle: the correct results.
        real: bool [batch, length], False for padding, whose values have no meaning but must be finite.
        tolerances: the largest errors that pass.
    """
    passes = {name: worst_error(getattr(result, name), oracle.logits, real) for name in ("logits", "cached", "chunked")}
    layers = tuple(
        worst_error(ours, theirs, real) for ours, theirs in zip(result.hidden_states, oracle.hidden_states, strict=True)
    )
    argmax = compare_argmax(result.logits, oracle.logits, real, tolerances.logits)
    failures = [
        f"{name}{list(worst.index)}: error {worst.error:.1e}, tolerance {getattr(tolerances, name):.0e}"
        for name, worst in passes.items()
        if not worst.error <= getattr(tolerances, name)
    ]
    too_far = (i for i, layer in enumerate(layers) if not layer.error <= tolerances.hidden_states)
    if (first := next(too_far, None)) is not None:  # Later layers only inherit the error of the first one.
        worst = layers[first]
        failures.append(
            f"hidden_states[{first}]{list(worst.index)}: error {worst.error:.1e}, "
            f"tolerance {tolerances.hidden_states:.0e}; the first hidden state that is off"
        )
    if argmax.different:
        failures.append(f"another likeliest token at {argmax.different} of {argmax.positions} positions")
    return Measurement(**passes, layers=layers, argmax=argmax, seconds=result.seconds, failures=tuple(failures))


def worst_error(found: np.ndarray, expected: np.ndarray, real: np.ndarray) -> Worst:
    """The largest difference at real positions, relative to the largest absolute expected value there.

    Args:
        found, expected: [batch, length, width].
        real: bool [batch, length].

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"expected an array {list(expected.shape)}, found {list(found.shape)}")
    worst = Worst(-1.0, ())
    for row, keep in enumerate(real):  # Row by row, as temporaries with 256,008 logits per position are large.
        with np.errstate(invalid="ignore"):
            difference = np.abs(found[row] - expected[row]) * keep[:, None]
        difference[~np.isfinite(found[row])] = np.inf
        index = np.unravel_index(difference.argmax(), difference.shape)
        if difference[index] > worst.error:
            worst = Worst(float(difference[index]), (row, *(int(i) for i in index)))
    return Worst(worst.error / _scale(expected, real), worst.index)


def compare_argmax(found: np.ndarray, expected: np.ndarray, real: np.ndarray, tolerance: float) -> Agreement:
    """Compares the likeliest tokens at real positions; see `worst_error` for the arguments."""
    ties = different = 0
    limit = tolerance * _scale(expected, real)
    for row, keep in enumerate(real):
        logits = expected[row]
        margin = logits.max(axis=-1) - np.take_along_axis(logits, found[row].argmax(axis=-1)[:, None], axis=-1)[:, 0]
        ties += int((keep & (margin > 0) & (margin < limit)).sum())
        different += int((keep & (margin >= limit)).sum())
    return Agreement(int(real.sum()), ties, different)


def between_backends(logits: dict[str, np.ndarray], real: np.ndarray) -> tuple[Worst, tuple[str, str]] | None:
    """The two backends whose logits differ most, and by how much; None for a single backend."""
    pairs = [(worst_error(logits[a], logits[b], real), (a, b)) for a, b in combinations(logits, 2)]
    return max(pairs, key=lambda pair: pair[0].error, default=None)


SUMMARY_HEADER = ("logits", "worst at", "layers", "cached", "chunked", "argmax", "seconds", "")


def legend(tolerances: Tolerances) -> str:
    """Explains the numbers below `SUMMARY_HEADER`."""
    return f"largest error / largest value, worst at row, position, id; up to {tolerances.logits:.0e} passes"


def summary_cells(measurement: Measurement) -> tuple[str, ...]:
    """The cells of a backend's row below `SUMMARY_HEADER`."""
    return (
        f"{measurement.logits.error:.1e}",
        str(list(measurement.logits.index)),
        f"{measurement.layers[measurement.worst_layer].error:.1e}",
        f"{measurement.cached.error:.1e}",
        f"{measurement.chunked.error:.1e}",
        f"{measurement.argmax.percent:.4g}%",
        f"{measurement.seconds:.1f}",
        "FAIL" if measurement.failures else "pass",
    )


def layer_table(measurements: dict[str, Sequence[Measurement]]) -> str:
    """A table of the worst error of each hidden state, with a column for each backend."""
    depth = max(len(measurement.layers) for each in measurements.values() for measurement in each)
    rows = []
    for layer in range(depth):
        errors = [max(m.layers[layer].error for m in each if layer < len(m.layers)) for each in measurements.values()]
        rows.append((str(layer), *(f"{error:.1e}" for error in errors)))
    return table(("layer", *measurements), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns, indented by two spaces."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"  {line}".rstrip() for line in padded)


def json_line(values: dict[str, Any], *, ensure_ascii: bool = True) -> str:
    """The values as JSON on one line; a float that JSON cannot hold, such as an infinite error, becomes null."""
    return json.dumps(_finite(values), allow_nan=False, ensure_ascii=ensure_ascii)


def _scale(expected: np.ndarray, real: np.ndarray) -> float:
    """The largest absolute value at real positions; 1 if all are 0."""
    largest = max(float(np.abs(values[keep]).max(initial=0)) for values, keep in zip(expected, real, strict=True))
    return largest or 1.0


def _finite(value: Any) -> Any:
    """Replaces floats that JSON cannot hold by None, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
