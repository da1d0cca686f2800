"""`xglm generate` as a user runs it."""

import io
import json

import numpy as np
import pytest

from tests.helpers.commands import ROOT, run_xglm
from tests.helpers.frameworks import backends_under_test, needs_a_backend
from xglm_core.cli import main

TINY = ROOT / "examples" / "tiny_model" / "checkpoint"
LITTLE = "The little dog found a fish near the river\n"

pytestmark = needs_a_backend


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process; returns exit code, output and errors."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = main(["generate", str(TINY), "--backend", backends_under_test()[0], *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


class TestText:
    @pytest.mark.parametrize("backend", backends_under_test())
    def test_is_printed(self, backend):
        result = run_xglm("generate", TINY, "The little", "--max-new-tokens", 12, "--backend", backend)
        assert (result.returncode, result.stdout) == (0, LITTLE), result.stderr
        assert "xglm" not in result.stderr  # TensorFlow says something of its own.

    def test_several(self, run):
        assert run("The little", "-", "--max-new-tokens", 12, stdin="Treni ya\nПосле школы\n")[:2] == (
            0,
            LITTLE + "Treni ya mjini imejaa watu wanaosoma na wana\nПосле школы девочка кормит кошку и сад\n",
        )

    def test_options_of_the_command(self, run):
        sampled = [run("The", "--do-sample", "--temperature", 2, "--top-k", 0, "--seed", seed)[1] for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
        assert run("The little", "--num-beams", 3, "--max-new-tokens", 12)[1].startswith("The little")
        stopped = run("The little", "--stop-strings", "fish", "--stop-strings", "cat")[1]
        assert "fish" in stopped
        assert len(stopped) < len(LITTLE)

    def test_a_seed_that_was_drawn_is_told(self, run):
        sample = ("The", "Every", "--do-sample", "--temperature", 2, "--top-k", 0)
        code, texts, errors = run(*sample)
        seed = errors.split("xglm: --seed ")[1].split(" gives the same texts again\n")[0]
        assert (code, run(*sample, "--seed", seed)) == (0, (0, texts, ""))
        assert "--seed" not in run("The", "--max-new-tokens", 2)[2]

    def test_line_breaks(self, run):
        """A sentence of the corpus ends with </s>, its line break."""
        one = run("The little", "--max-new-tokens", 40)[1]
        more = run("The little", "--max-new-tokens", 40, "--go-on-at-eos", "--newline", "eos")[1]
        assert one.count("\n") == 1
        assert more.count("\n") > 1
        assert more.startswith(one)

    def test_broken_pipe(self):
        before = "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        result = run_xglm("generate", TINY, "The little", "--backend", backends_under_test()[0], before=before)
        assert (result.returncode, result.stderr) == (1, "")


class TestOutput:
    PROMPTS = ("The little", "Treni ya", "После школы", "Every", "The old")

    def rows(self, path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def test_goes_on_where_it_was_interrupted(self, run, tmp_path):
        path = tmp_path / "out.jsonl"
        options = ("--output", path, "--max-new-tokens", 7, "--do-sample", "--seed", 3, "--temperature", 1.5)
        assert run(*self.PROMPTS, *options)[:2] == (0, "")
        whole = path.read_bytes()
        assert [(row["line"], row["prompt"]) for row in self.rows(path)] == [*enumerate(self.PROMPTS, start=1)]
        assert all(row["text"] for row in self.rows(path))
        for end in (len(whole) - 5, whole.index(b"\n") + 1, whole.index(b"\n") + 9, 0):
            path.write_bytes(whole[:end])
            assert run(*self.PROMPTS, *options)[0] == 0
            assert path.read_bytes() == whole

    def test_is_that_of_each_text_alone(self, run, tmp_path):
        run(*self.PROMPTS, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 7)
        texts = [f"{row['prompt']}{row['text']}\n" for row in self.rows(tmp_path / "out.jsonl")]
        assert texts == [run(prompt, "--max-new-tokens", 7)[1] for prompt in self.PROMPTS]

    def test_copies_differ_also_after_an_interruption(self, run, tmp_path):
        """More than a batch, so that copies are in several."""
        path = tmp_path / "out.jsonl"
        prompts = ("Every", *self.PROMPTS, *self.PROMPTS, "Every")
        options = (
            "--output",
            path,
            "--max-new-tokens",
            7,
            "--do-sample",
            "--seed",
            3,
            "--temperature",
            2,
            "--top-k",
            0,
        )
        assert run(*prompts, *options)[:2] == (0, "")
        rows = self.rows(path)
        assert [row["prompt"] for row in rows] == [*prompts]
        assert len({row["text"] for row in rows if row["prompt"] == "Every"}) == 4
        whole = path.read_bytes()
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
        assert run(*prompts, *options)[0] == 0
        assert path.read_bytes() == whole

    def test_other_texts_are_not_mixed(self, run, tmp_path):
        path = tmp_path / "out.jsonl"
        run("The little", "--output", path, "--max-new-tokens", 4)
        whole = path.read_bytes()
        code, _, error = run("Every", "The", "--output", path, "--max-new-tokens", 4)
        assert code == 2
        assert "out.jsonl: has other rows for line 1, from another input, checkpoint or option" in error
        assert path.read_bytes() == whole


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("a", "--temperature", "0.5"), "temperature=0.5 has no effect without do_sample=True"),
            (("a", "--max-new-tokens", "0"), "max_new_tokens is 0, expected a positive integer"),
            (("a", "--max-new-tokens", "5000"), "position 5001 is past the limit of 2048 tokens"),
            (("a", "--output", "x", "--do-sample"), "--output with --do-sample needs --seed"),
            (("",), "TEXT is empty, expected a text to continue"),
            (("a", "--stop-strings", "b\n"), "stop_strings has 'b\\n', which the tokenizer's texts never contain"),
            ((), "standard input: is empty, expected at least one line"),
        ],
    )
    def test_one_line(self, run, arguments, message):
        code, output, error = run(*arguments)
        assert (code, output) == (2, "")
        assert error.startswith("xglm: error: ")
        assert message in error
        assert error.count("\n") == 1

    def test_bad_line(self, run):
        code, _, error = run(stdin="a\n\n")
        assert code == 2
        assert "standard input, line 2: the line is empty" in error


def test_arrays_are_taken_as_they_are(tmp_path):
    """What the command does: numpy in, whatever the backend."""
    from tests.helpers.frameworks import Framework

    fw = Framework(backends_under_test()[0])
    model = fw.causal_lm.from_pretrained(TINY)
    ids = np.array([[2, 5, 6]])
    assert np.array_equal(np.asarray(model.generate(ids)), fw.generate(model, ids))
