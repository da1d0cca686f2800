"""`xglm bench`: the runner with the tiny model, one turn, and what it makes of results."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.commands import ROOT, assert_refused, run_xglm
from tests.helpers.frameworks import needs
from xglm_core import XGLMConfig
from xglm_core.backends import BACKENDS
from xglm_core.bench import machine
from xglm_core.bench.cases import CASES, Job, count_new, named, prompts, work
from xglm_core.bench.report import comparison, growths, plot, read_lines, summary
from xglm_core.cli import main
from xglm_core.errors import InputError

TINY = ROOT / "examples" / "tiny_model" / "checkpoint"
CONFIG = XGLMConfig(vocab_size=101, d_model=8, ffn_dim=20, num_layers=3, attention_heads=2)


def bench(*arguments, folder):
    """Runs a case once, with the tiny model; returns the results."""
    file = folder / "results.json"
    given = ["--checkpoint", TINY, "--turns", 1, "--work", folder / "work", "--json", file]
    code = main([*map(str, ["bench", *arguments, *given])])
    assert code == 0
    return read_lines(file)


def job(case, **values):
    shape = CASES[case]
    fields = {"layers": None, "rows": shape.rows, "length": shape.length, "new": shape.new, "checkpoint": "here"}
    fields |= {"size": "564M", "dtype": "float32", "quantization": None, "device": "cpu"}
    fields |= {"work": "", "vocabulary": "", "text": "", "engine": "torch"}
    return Job(case, **{**fields, **values})


def result(case="decode-1", seconds=(1.0,), **values):
    """A line of results, as far as reports read it."""
    found = {"median_s": float(np.median(seconds)), "all_s": list(seconds), "spread": 0.0, "first_token_s": None}
    found |= {"units_per_s": 1.0, "unit": "tokens", "limit_s": 0.5, "of_limit": 0.5, "compile_s": 0.0}
    found |= {"memory_mb": 100.0, "device_mb": None, "stamp": {"cpu": "a", "threads": 2, "commit": "1"}}
    return {**vars(job(case)), **found, **values}


@pytest.fixture
def quick_limits(monkeypatch):
    """The machine's limits without measuring them."""
    monkeypatch.setattr(machine, "limits", lambda device: {"read_gb_s": 10.0, "float32_gflop_s": 100.0})


class TestRun:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_decode(self, backend, tmp_path, capsys):
        needs(backend)
        shape = ("--rows", 2, "--length", 8, "--new-tokens", 4)
        (line,) = bench("decode-8", "--backend", backend, *shape, folder=tmp_path)
        assert (line["case"], line["engine"], line["rows"], line["length"], line["new"]) == (
            "decode-8",
            backend,
            2,
            8,
            4,
        )
        assert line["all_s"] == [line["median_s"]]
        assert line["first_token_s"] > 0
        assert (line["units"], line["unit"]) == (8, "tokens")
        assert line["units_per_s"] == pytest.approx(8 / line["median_s"], rel=1e-3)
        assert line["of_limit"] == pytest.approx(line["limit_s"] / line["median_s"], rel=1e-3)
        assert line["memory_mb"] > 100
        assert line["compile_s"] >= 0
        assert min(line["limits"].values()) > 0
        assert {"cpu", "cores", "threads", "commit", "date"} <= {*line["stamp"]}
        assert {"xglm", "python", "numpy"} < {*line["stamp"]["versions"]}
        assert "decode-8 2x8+4" in capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_all_cases(self, backend, tmp_path):
        needs(backend)
        for case, shape in {
            "load-warm": (),
            "load-bin-cold": (),
            "start": (),
            "prefill": ("--length", 8),
            "score": ("--rows", 2, "--length", 8),
            "decode-prompts": ("--rows", 4, "--length", 16, "--new-tokens", 8),
            "train": ("--rows", 2, "--length", 8),
            "loss": ("--rows", 2, "--length", 8),
        }.items():
            *_, line = bench(case, "--backend", backend, *shape, folder=tmp_path)
            assert (line["case"], line["engine"]) == (case, backend)
            assert line["median_s"] > 0

    def test_int8(self, tmp_path, quick_limits):
        needs("torch")
        shape = ("--length", 8, "--new-tokens", 4)
        floats, int8 = (
            bench("decode-1", "--backend", "torch", *shape, *quantized, folder=tmp_path)[-1]
            for quantized in ((), ("--quantization", "int8"))
        )
        assert (floats["quantization"], int8["quantization"]) == (None, "int8")
        assert int8["limit_s"] < floats["limit_s"]

    def test_tokenizers(self, tmp_path, quick_limits):
        against = "core-fast,sentencepiece,tokenizers"
        lines = bench("tokenize-batch", "--rows", 20, "--against", against, folder=tmp_path)
        assert [line["engine"] for line in lines] == ["core", *against.split(",")]
        assert lines[0]["units"] == lines[1]["units"] == lines[2]["units"] + 20  # One `</s>` before each line.

    def test_convert(self, tmp_path, quick_limits):
        lines = bench("convert-safetensors-torch", "--against", "system", folder=tmp_path)
        assert [line["engine"] for line in lines] == ["core", "system"]
        assert lines[0]["unit"] == "MB"

    def test_a_file_made_in_pieces(self, tmp_path, quick_limits):
        """What a file has is not measured again."""
        first = bench("tokenize-batch", "--rows", 20, folder=tmp_path)
        both = bench("tokenize", "--rows", "20,30", folder=tmp_path)
        assert both[:1] == first
        assert [(line["case"], line["rows"]) for line in both[1:]] == [
            ("tokenize-batch", 30),
            *((case, rows) for case in ("tokenize-lines", "tokenize-text") for rows in (20, 30)),
        ]

    def test_missing_peer(self, tmp_path, capsys, quick_limits):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        python.chmod(0o755)
        lines = bench("tokenize-batch", "--rows", 20, "--against", "hf", "--peer-python", python, folder=tmp_path)
        assert [line["engine"] for line in lines] == ["core"]
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith("xglm: tokenize-batch: hf is left out: ")
        assert "No module named" in message

    def test_imports_no_framework(self):
        code = "import sys\nfrom xglm_core.cli import main\nmain(['bench'])\nsys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


class TestWrongUse:
    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["fly"], ["fly", "xglm bench --help"]),
            (["score", "--turns", 0], ["--turns is 0"]),
            (["score", "--rows", "2,x"], ["--rows", "'2,x'"]),
            (["score", "--backend", "keras"], ["--backend", "'keras'", "torch, tf, flax"]),
            (["score", "--against", "onnx"], ["--against", "'onnx'", "ct2"]),
            (["score", "--checkpoint", TINY, "--layers", 2], ["--layers", "--checkpoint"]),
            (["score", "--checkpoint", TINY, "--length", 10_000], ["score", "10000"]),
            (["score", "--checkpoint", TINY, "--against", "ct2", "--peer-python", "/no/python"], ["/no/python"]),
            (["score", "--size", "8B"], ["--size", "564M"]),
            (["show", "missing.json"], ["missing.json", "cannot be read"]),
            (["compare", "a.json"], ["B"]),
        ],
        ids=lambda value: " ".join(map(str, value[:2])),
    )
    def test_refused(self, arguments, parts, tmp_path):
        if arguments[0] not in ("fly", "show", "compare"):
            arguments = [*arguments, "--work", tmp_path]
        assert_refused(run_xglm("bench", *arguments), *parts)

    def test_file_of_something_else(self, tmp_path):
        file = tmp_path / "results.json"
        file.write_text(f'{json.dumps(result())}\n{{"case": 1}}\n')
        assert_refused(run_xglm("bench", "show", file), "results.json, line 2", "no result of xglm bench")


class TestCases:
    def test_names(self):
        assert [case.name for case in named("decode")] == ["decode-1", "decode-8", "decode-context", "decode-prompts"]
        assert [case.name for case in named("load-bin")] == ["load-bin-cold", "load-bin-warm"]
        assert len(named("all")) == len(CASES)

    def test_work(self):
        """By hand: a block has 4 matrices of 8 x 8 and 2 of 8 x 20, which a token multiplies by, and reads once."""
        block, head = 4 * 64 + 2 * 160, 101 * 8
        (prefill,) = work(job("prefill", rows=2, length=5), CONFIG, 10)
        keys = 2 * 3 * 8 * 4  # Bytes of a position: a key and a value in each block.
        assert prefill[0] == 4 * (3 * block + head) + 2 * 5 * keys
        pairs = 2 * (1 + 2 + 3 + 4 + 5)
        assert prefill[1] == 2 * 10 * 3 * block + 2 * 2 * 8 * 3 * pairs + 2 * 2 * head
        first, *steps = work(job("decode-1", length=5, new=3), CONFIG, 3)
        assert first[0] == 4 * (3 * block + head) + 5 * keys
        assert steps[1] == (4 * (3 * block + head) + 7 * keys, 2 * 3 * block + 2 * 2 * 8 * 3 * 7 + 2 * head)
        (int8,) = work(job("prefill", length=1, quantization="int8"), CONFIG, 1)
        assert int8[0] == 3 * block + head + keys

    def test_prompts_of_different_lengths(self):
        ids, mask, ends = prompts(job("decode-prompts"), CONFIG)
        assert ids.shape == mask.shape == (64, 64)
        assert len({*mask.sum(1)}) > 10
        assert (np.diff(mask) >= 0).all()
        assert count_new([[1, 15, 3], [1, 2, 3]], ends) == 2 + 3


class TestReports:
    def test_table(self):
        text = summary([result(), result(engine="ct2", seconds=(2.0,))])
        assert "decode-1 1x32+32 564M-float32" in text
        assert "/ ct2" in text
        assert "0.50" in text

    def test_compare(self):
        before = [result(seconds=(1.0, 1.1, 1.2)), result("score", (1.0, 2.0)), result("train")]
        after = [result(seconds=(0.5, 0.6, 0.7)), result("score", (1.1, 2.1))]
        text = comparison(before, after)
        decode, score = (line for line in text.splitlines() if "564M" in line)
        assert "0.55" in decode
        assert "faster" in decode
        assert "faster" not in score
        assert "slower" not in score
        assert "one of the two files only: 1" in text

    def test_compare_of_nothing_in_common(self):
        with pytest.raises(InputError, match="nothing to compare"):
            comparison([result()], [result("score")])

    def test_growth(self):
        """The coefficients come back, and the share of the square."""
        square = [result("prefill", (1 + 0.01 * n + 1e-5 * n * n,), length=n) for n in (64, 128, 256, 512)]
        straight = [result("decode-1", (1 + 0.01 * n,), new=n) for n in (8, 16, 32)]
        found = {growth[0]: growth[2] for growth in growths([*square, *straight])}
        np.testing.assert_allclose(found["length"], [1e-5, 0.01, 1], rtol=1e-6)
        np.testing.assert_allclose(found["new"], [0, 0.01, 1], rtol=1e-6)
        assert "of which the square is 30% at 512" in summary(square)

    @pytest.mark.parametrize("sizes", [(64,), (64, 128, 256)])
    def test_plot(self, sizes, tmp_path):
        pytest.importorskip("matplotlib")
        lines = [result("prefill", (n * 0.01,), engine=name, length=n) for n in sizes for name in ("flax", "ct2")]
        plot(lines, tmp_path / "image.svg")
        assert (tmp_path / "image.svg").read_text().count("ct2") >= 1
