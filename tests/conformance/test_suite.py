"""The conformance suite, run as users run it."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import conformance.__main__
from conformance.cases import CASES
from conformance.golden import load_golden
from tests.helpers.commands import ROOT
from tests.helpers.frameworks import backends_under_test, needs_a_backend
from xglm_core import open_checkpoint
from xglm_core.compare.oracle import checkpoint_reader, forward
from xglm_core.compare.run import BackendRun, Result


def run_suite(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "conformance", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


SOME = ["plain", "left_padding", "untied_head"]
OTHERS = [case.name for case in CASES if case.name not in SOME]


@needs_a_backend
@pytest.mark.parametrize("cases", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_every_case_in_every_backend(cases):
    run = run_suite("--backends", ",".join(backends_under_test()), "--cases", ",".join(cases))
    assert run.returncode == 0, run.stdout + run.stderr
    numbers = json.loads(run.stdout.splitlines()[-1])
    assert numbers["passed"]
    assert list(numbers["cases"]) == cases
    for case in (case for case in CASES if case.name in cases):
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
    run = run_suite(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"conformance: error: {message}")
    assert run.stderr.count("\n") == 1


class TestJudgement:
    """What the suite says of a backend that is the oracle itself, and of one that is not quite."""

    @pytest.fixture
    def suite(self, monkeypatch, capsys):
        """Runs the suite with the oracle in the place of a backend; `spoil` may change its results, case by case."""

        def run(*cases, spoil=lambda case, result: result):
            def run_backend(backend, jobs, folder):
                results = []
                for name, job in zip(cases, jobs, strict=True):
                    (case,) = (case for case in CASES if case.name == name)
                    read = checkpoint_reader(open_checkpoint(job.checkpoint))
                    output = forward(case.config, read, case.input_ids, case.attention_mask)
                    logits = output.logits.astype(np.float32)
                    states = np.stack(output.hidden_states).astype(np.float32)
                    generated = load_golden(case).greedy
                    results.append(spoil(name, Result(logits, states, logits, logits, generated, seconds=0.5)))
                return BackendRun({"numpy": np.__version__}, results)

            monkeypatch.setattr(conformance.__main__, "run_backend", run_backend)
            monkeypatch.setattr(conformance.__main__, "parse_backends", lambda names: names.split(","))
            code = conformance.__main__.main(["--backends", "torch,flax", "--cases", ",".join(cases)])
            numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert numbers["passed"] == (code == 0)
            return code, [f"{name}: {line}" for name in cases for line in numbers["cases"][name]["failures"]]

        return run

    def test_right(self, suite):
        assert suite("plain", "left_padding", "untied_head") == (0, [])

    def test_wrong_cache(self, suite):
        def spoil(case, result):
            if case == "left_padding":
                result = replace(result, cached=result.cached.copy())
                result.cached[2, 11, 5] += 1
            return result

        code, failures = suite("plain", "left_padding", spoil=spoil)
        assert code == 1
        assert [line.partition(": error")[0] for line in failures] == [
            "left_padding: torch cached[2, 11, 5]",
            "left_padding: flax cached[2, 11, 5]",
        ]

    def test_other_text_than_transformers(self, suite):
        def spoil(case, result):
            generated = result.generated.copy()
            generated[1, -3] += 1
            return replace(result, generated=generated)

        code, failures = suite("untied_head", spoil=spoil)
        assert code == 1
        assert failures == [f"untied_head: {name} generates other ids than transformers" for name in ("torch", "flax")]

    def test_no_text(self, suite):
        code, _ = suite("untied_head", spoil=lambda case, result: replace(result, generated=None))
        assert code == 1

    @pytest.mark.parametrize(
        ("change", "failure"),
        [
            (
                lambda golden: replace(golden, logits=golden.logits * np.float32(1.0001)),
                "plain: oracle and transformers: error 1.0e-04, tolerance 2e-06",
            ),
            (
                lambda golden: replace(golden, digest="0"),
                "plain: the golden numbers belong to another version of this case; run: make golden",
            ),
        ],
        ids=["logits", "digest"],
    )
    def test_golden_numbers(self, suite, monkeypatch, change, failure):
        monkeypatch.setattr(conformance.__main__, "load_golden", lambda case: change(load_golden(case)))
        assert suite("plain") == (1, [failure])
