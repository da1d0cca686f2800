"""Where commands write: files, devices, standard output, and what happens where that fails."""

import io
import json
import os
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.frameworks import backends_under_test, needs_a_backend
from xglm_core.cli import main

TINY = ROOT / "examples" / "tiny_model" / "checkpoint"
GENERATE = ("generate", str(TINY), "The little", "--max-new-tokens", "2")


@pytest.fixture
def run(capfdbinary, monkeypatch):
    """Runs a command in this process; returns exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The little\nEvery\n")))
        code = main([*map(str, arguments), "--backend", backends_under_test()[0]])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return run


def shell(command):
    """Runs `xglm` by a line of shell, where XGLM stands for it."""
    program = f"{sys.executable} -P -c 'import sys; from xglm_core.cli import main; sys.exit(main())'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", command.replace("XGLM", program)], env=environment, capture_output=True, text=True, check=False
    )


@needs_a_backend
class TestDevices:
    @pytest.mark.parametrize("command", [GENERATE, ("score", TINY, "-")])
    def test_dev_null_takes_everything(self, run, command):
        assert run(*command, "--output", "/dev/null")[:2] == (0, "")

    @pytest.mark.parametrize("command", [GENERATE, ("score", TINY, "-")])
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
    def test_a_full_disk_is_one_line(self, run, command):
        code, out, err = run(*command, "--output", "/dev/full")
        assert (code, out) == (2, "")
        assert err.splitlines()[-1] == "xglm: error: /dev/full: cannot be written: No space left on device"

    def test_a_page(self, run):
        assert run("score", TINY, "-", "--html", "/dev/null")[0] == 0

    def test_a_minus_is_standard_output(self, run):
        code, out, _ = run(*GENERATE, "--output", "-")
        assert (code, json.loads(out)["prompt"]) == (0, "The little")
        assert run("score", TINY, "-", "--output", "-")[1] == run("score", TINY, "-")[1] != ""
        assert not os.path.exists("-")


@needs_a_backend
@pytest.mark.parametrize("command", [GENERATE, ("score", TINY, "-")])
@pytest.mark.parametrize("device", ["foo", "cuda:9"])
def test_a_device_that_is_not_there(run, command, device):
    code, out, err = run(*command, "--device", device)
    assert (code, out) == (2, "")
    assert f"device is '{device}', " in err.splitlines()[-1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_standard_output_on_a_full_disk():
    result = shell(f"XGLM inspect {TINY} > /dev/full")
    assert (result.returncode, result.stderr) == (
        2,
        "xglm: error: output: cannot be read or written: No space left on device\n",
    )


def test_closed_standard_output():
    result = shell(f"XGLM inspect {TINY} >&-")
    assert (result.returncode, result.stderr) == (
        2,
        "xglm: error: standard output is closed; redirect it to a file, or to /dev/null\n",
    )


def test_closed_standard_error():
    result = shell(f"XGLM inspect {TINY} 2>&-")
    assert (result.returncode, result.stdout != "") == (0, True)
    assert shell("XGLM inspect nowhere 2>&-").returncode == 2


def test_closed_standard_input():
    result = shell(f"XGLM score {TINY} - <&-")
    assert result.returncode == 2
    assert result.stderr == "xglm: error: standard input is closed, expected lines; redirect it from a file\n"
