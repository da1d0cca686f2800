"""The conformance suite, run as users run it."""

import json
import subprocess
import sys

import pytest

from conformance.cases import CASES
from tests.commands import ROOT
from tests.frameworks import backends_under_test


def conformance(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "conformance", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not backends_under_test(), reason="needs a backend")
def test_every_case_in_every_backend():
    run = conformance("--backends", ",".join(backends_under_test()))
    assert run.returncode == 0, run.stdout + run.stderr
    numbers = json.loads(run.stdout.splitlines()[-1])
    assert numbers["passed"]
    assert list(numbers["cases"]) == [case.name for case in CASES]
    for case in CASES:
        report = numbers["cases"][case.name]
        assert list(report["measurements"]) == backends_under_test()
        for measurement in report["measurements"].values():
            assert len(measurement["layers"]) == case.config.num_layers + 1
            # Float32 cannot match float64 exactly: an error of 0 would mean that nothing was compared.
            for name in ("logits", "cached", "chunked"):
                assert 0 < measurement[name]["error"] <= numbers["tolerances"][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "keras"], "no backend 'keras'"),
        (["--cases", "plain,odd"], "no case 'odd'; expected some of plain, "),
    ],
)
def test_wrong_arguments(arguments, message):
    run = conformance(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"conformance: error: {message}")
    assert run.stderr.count("\n") == 1
