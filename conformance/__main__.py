"""The conformance suite: each case in each backend against the float64 oracle, and the oracle against transformers."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from conformance.cases import CASES, Case
from conformance.golden import NEW_TOKENS, case_digest, load_golden
from conformance.random_weights import write_checkpoint
from xglm_core.backends import BACKENDS
from xglm_core.checkpoint import open_checkpoint
from xglm_core.compare.oracle import checkpoint_reader, forward
from xglm_core.compare.report import (
    SUMMARY_HEADER,
    Measurement,
    Tolerances,
    Worst,
    between_backends,
    json_line,
    layer_table,
    legend,
    load_tolerances,
    measure,
    summary_cells,
    table,
    worst_error,
)
from xglm_core.compare.run import Result, parse_backends, progress, run_backend
from xglm_core.compare.worker import Job
from xglm_core.errors import InputError, XGLMError


@dataclass(frozen=True, eq=False)
class CaseReport:
    """One case.

    Attributes:
        golden: worst logit of the oracle against transformers.
        measurements: errors against the oracle, by backend.
        between: the two backends that differ most, see `between_backends`.
        failures: a line for each thing that is not as it should be.
    """

    golden: Worst
    measurements: dict[str, Measurement]
    between: tuple[Worst, tuple[str, str]] | None
    failures: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite, prints tables and then one line of JSON.

    Returns:
        The exit code: 0, 1 if anything is above its tolerance, 2 for a wrong argument.
    """
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--backends", default=",".join(BACKENDS), metavar="LIST", help="some of %(default)s (all)")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), metavar="LIST", help="by name (all)")
    arguments = parser.parse_args(argv)
    try:
        cases, backends = _parse_cases(arguments.cases), parse_backends(arguments.backends)
    except XGLMError as error:
        print(f"conformance: error: {error}", file=sys.stderr)
        return 2
    tolerances = load_tolerances()
    versions, reports = _run(cases, backends, tolerances)
    failures = [f"{case}: {failure}" for case, report in reports.items() for failure in report.failures]
    _print_tables(reports, backends, tolerances)
    print("\n".join(f"FAIL: {failure}" for failure in failures) or f"PASS: {len(cases)} cases in {', '.join(backends)}")
    print(
        json_line(
            {
                "passed": not failures,
                "tolerances": asdict(tolerances),
                "versions": versions,
                "cases": {case: asdict(report) for case, report in reports.items()},
            }
        )
    )
    return 1 if failures else 0


def _parse_cases(names: str) -> list[Case]:
    cases = {case.name: case for case in CASES}
    for name in names.split(","):
        if name not in cases:
            raise InputError(f"no case {name!r}; expected some of {', '.join(cases)}")
    return [cases[name] for name in names.split(",")]


def _run(
    cases: Sequence[Case], backends: Sequence[str], tolerances: Tolerances
) -> tuple[dict[str, dict[str, str]], dict[str, CaseReport]]:
    """Runs all cases; returns the frameworks' versions by backend, and the reports by case."""
    with tempfile.TemporaryDirectory(prefix="xglm-conformance-") as name:
        folder = Path(name)
        jobs = [_job(case, folder / case.name) for case in cases]
        runs = {}
        for backend in backends:
            with progress(backend):
                runs[backend] = run_backend(backend, jobs, folder)
        with progress("oracle"):
            reports = {
                case.name: _report(
                    case, folder / case.name, {backend: run.results[index] for backend, run in runs.items()}, tolerances
                )
                for index, case in enumerate(cases)
            }
    return {backend: run.versions for backend, run in runs.items()}, reports


def _job(case: Case, folder: Path) -> Job:
    """Writes the checkpoint of a case; returns what a backend has to do with it."""
    write_checkpoint(folder, case.config, case.seed)
    mask = None if case.attention_mask is None else case.attention_mask.tolist()
    new_tokens = 0 if load_golden(case).greedy is None else NEW_TOKENS
    return Job(str(folder), case.input_ids.tolist(), mask, list(case.chunks), new_tokens)


def _report(case: Case, folder: Path, results: dict[str, Result], tolerances: Tolerances) -> CaseReport:
    real = np.ones(case.input_ids.shape, bool) if case.attention_mask is None else case.attention_mask != 0
    oracle = forward(case.config, checkpoint_reader(open_checkpoint(folder)), case.input_ids, case.attention_mask)
    measurements = {backend: measure(result, oracle, real, tolerances) for backend, result in results.items()}
    failures = [f"{backend} {failure}" for backend, each in measurements.items() for failure in each.failures]

    golden = load_golden(case)
    kept = oracle.logits[:, golden.positions][:, :, golden.columns]
    golden_error = worst_error(kept, golden.logits, real[:, golden.positions])
    if golden.digest != case_digest(case):
        failures.append("the golden numbers belong to another version of this case; run: make golden")
    if not golden_error.error <= tolerances.golden:
        failures.append(f"oracle and transformers: error {golden_error.error:.1e}, tolerance {tolerances.golden:.0e}")
    if golden.greedy is not None:
        failures += [
            f"{backend} generates other ids than transformers"
            for backend, result in results.items()
            if not np.array_equal(np.asarray(result.generated), golden.greedy)
        ]
    between = between_backends({backend: result.logits for backend, result in results.items()}, real)
    return CaseReport(golden_error, measurements, between, failures)


def _print_tables(reports: dict[str, CaseReport], backends: Sequence[str], tolerances: Tolerances) -> None:
    print("Float32 backends against the float64 oracle")
    print(f"({legend(tolerances)})\n")
    rows: list[Sequence[str]] = [
        (case if backend == backends[0] else "", backend, *summary_cells(measurement))
        for case, report in reports.items()
        for backend, measurement in report.measurements.items()
    ]
    print(table(("case", "backend", *SUMMARY_HEADER), rows))
    print("\nHidden states: the worst of all cases, by layer\n")
    print(layer_table({backend: [report.measurements[backend] for report in reports.values()] for backend in backends}))
    worst, case = max((report.golden.error, case) for case, report in reports.items())
    print(f"\nOracle against transformers: at most {worst:.1e} ({case})\n")


if __name__ == "__main__":
    sys.exit(main())
