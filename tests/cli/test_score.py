"""`xglm score`: what it reads and writes, how it goes on after an interruption, and its page."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.helpers.commands import ROOT, run_xglm
from tests.helpers.frameworks import backends_under_test
from xglm_core import XGLMTokenizer
from xglm_core.cli import main
from xglm_core.cli import score as command
from xglm_core.scoring import html_page, score_texts

CHECKPOINT = ROOT / "examples" / "tiny_model" / "checkpoint"
# `xglm score CHECKPOINT` with a model made of numpy, in a process of its own.
_CODE = (
    "import sys; from tests.cli.test_score import Model, command, main; "
    "command.load_model = lambda *arguments: (None, Model()); "
    "sys.exit(main())"
)
WITH_MODEL = (sys.executable, "-c", _CODE, "score", str(CHECKPOINT))
TEXTS = ["The little dog found a fish.", "كل صباح يذهب الأطفال", "子どもたちは", "Каждое утро", "a\tb & <i>c</i>"]


class Model:
    """Log-probabilities that depend on the id alone: fast, and the same whatever a text is batched with."""

    from xglm_core import XGLMConfig

    config = XGLMConfig.from_pretrained(CHECKPOINT)

    def __init__(self, scale=1.0):
        self.scale = scale
        self.calls = 0

    def score(self, input_ids, attention_mask):
        self.calls += 1
        return -self.scale * np.log2(1 + input_ids[:, 1:])


@pytest.fixture
def model(monkeypatch):
    """Stands in for the backend's."""
    model = Model()
    monkeypatch.setattr(command, "load_model", lambda *arguments: (None, model))
    return model


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def run(capsysbinary):
    def run(*arguments):
        """Exit code, standard output and standard error of `xglm score CHECKPOINT ARGUMENTS`."""
        code = main(["score", str(CHECKPOINT), *map(str, arguments)])
        captured = capsysbinary.readouterr()
        return code, captured.out.decode(), captured.err.decode()

    return run


def expected(texts, **options):
    return score_texts(Model(), XGLMTokenizer.from_pretrained(CHECKPOINT), texts, **options)


class TestBackends:
    @pytest.mark.parametrize("backend", backends_under_test())
    def test_as_a_user_runs_it(self, backend, texts):
        run = run_xglm("score", CHECKPOINT, texts, "--backend", backend, "--format", "tsv")
        assert run.returncode == 0, run.stderr
        header, *rows = [line.split("\t") for line in run.stdout.splitlines()]
        assert header == ["line", "count", "sum", "perplexity", "text"]
        assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
        perplexities = [float(row[3]) for row in rows]
        # A sentence of the corpus is likelier than what the model has never seen.
        assert perplexities[1] < 3 < 100 < perplexities[4]

    def test_no_backend(self, texts):
        run = run_xglm(
            "score", CHECKPOINT, texts, before="import sys; sys.modules.update(torch=None, keras=None, jax=None); "
        )
        assert run.returncode == 2
        assert "no backend is installed" in run.stderr
        assert "pip install 'xglm[torch]'" in run.stderr


class TestFormats:
    def test_jsonl(self, model, texts, run):
        code, out, err = run(texts, "--words")
        assert (code, err) == (0, "")
        for number, (line, score) in enumerate(zip(out.splitlines(), expected(TEXTS), strict=True), start=1):
            record = json.loads(line)
            assert record["line"] == number
            assert record["text"] == score.text
            assert record["tokens"] == score.tokens
            assert record["ids"] == score.ids
            assert record["offsets"] == [list(pair) for pair in score.offsets]
            assert record["log_probabilities"] == pytest.approx(score.log_probabilities, abs=1e-6)
            assert record["sum"] == pytest.approx(score.sum, abs=1e-6)
            assert record["count"] == score.count
            assert record["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
            assert [word["text"] for word in record["words"]] == [word.text for word in score.words]
        assert "words" not in json.loads(run(texts)[1].splitlines()[0])

    def test_tsv_of_words(self, model, texts, run):
        header, *rows = [line.split("\t") for line in run(texts, "--words", "--format", "tsv")[1].splitlines()]
        assert header == ["line", "begin", "end", "bits", "word"]
        words = [(str(n), w) for n, score in enumerate(expected(TEXTS), start=1) for w in score.words]
        assert [(row[0], row[4]) for row in rows] == [(number, word.text) for number, word in words]
        assert [float(row[3]) for row in rows] == pytest.approx([word.bits for _, word in words], abs=1e-6)

    def test_tsv_escapes(self, model, tmp_path, run):
        (tmp_path / "in").write_text(json.dumps({"text": "a\tb\nc\\n"}) + "\n")
        row = run(tmp_path / "in", "--format", "tsv")[1].splitlines()[1]
        assert row.endswith("\ta\\tb\\nc\\\\n")

    def test_pairs(self, model, tmp_path, run):
        (tmp_path / "in").write_text(json.dumps({"context": "The dog", "continuation": " found", "id": 7}) + "\n")
        record = json.loads(run(tmp_path / "in")[1])
        assert (record["text"], record["context"], record["continuation"]) == ("The dog found", "The dog", " found")
        assert "".join(record["tokens"]) == "▁found"

    def test_line_breaks(self, model, tmp_path, run):
        (tmp_path / "in").write_text(json.dumps({"text": "a\nb"}) + "\n")
        assert "</s>" in json.loads(run(tmp_path / "in", "--newline", "eos")[1])["tokens"]
        assert "</s>" not in json.loads(run(tmp_path / "in", "--newline", "space")[1])["tokens"]

    def test_numbers_that_json_cannot_hold(self, texts, run, monkeypatch):
        monkeypatch.setattr(command, "load_model", lambda *arguments: (None, Model(scale=np.nan)))
        assert json.loads(run(texts)[1].splitlines()[0])["sum"] is None

    def test_standard_input(self, texts):
        run = subprocess.run(
            [*WITH_MODEL, "-"],
            cwd=ROOT,
            input=texts.read_bytes()[:-1],  # The last line need not end.
            capture_output=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.splitlines()) == 5

    def test_a_closed_pipe(self, tmp_path):
        """`xglm score ... | head -1` ends without a word."""
        (tmp_path / "in").write_text("dog\n" * 20000)
        with subprocess.Popen(
            [*WITH_MODEL, str(tmp_path / "in")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a\n\nb\n", "line 2: the line is empty, expected a text; remove it"),
            (b"a\n\xff\n", "line 2: byte 0 is no UTF-8, expected UTF-8 text"),
            (b"", "is empty, expected at least one line"),
            (b'{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
            (b'{"text": "a"}\ndog\n', "line 2: Expecting value"),
            (b'{"text": 3}\n', 'line 1: \'{"text": 3}\' is another form of JSON, expected {"text": ...}'),
            (b'{"context": "a"}\n', "line 1: "),
            (b'{"text": "a", "context": "a", "continuation": "b"}\n', "line 1: "),
            (b'{"text": "a"}\n[1]\n', "line 2: '[1]' is another form of JSON"),
            (b"a\n\xe2\x80\x8b\n", "line 2: the text '\\u200b' has no tokens"),
            (b'{"context": "a", "continuation": ""}\n', "line 1: the continuation is empty"),
            (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: a text has the lone surrogate"),
        ],
    )
    def test_the_line_is_named(self, model, tmp_path, run, content, message):
        path = tmp_path / "in"
        path.write_bytes(content)
        code, out, err = run(path)
        assert (code, out) == (2, "")
        assert err.startswith(f"xglm: error: {path}")
        assert err.count("\n") == 1
        assert message in err
        assert not model.calls

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--stride", "2048"], "stride is 2048, expected 1 to 2047 (max_position_embeddings=2048)"),
            (["--stride", "0"], "stride is 0, expected 1 to 2047"),
            (["--batch-tokens", "0"], "--batch-tokens is 0, expected 1 or more"),
            (["--output", "/"], "/: cannot be written"),
            (["--html", "/none/page.html"], "/none/page.html: cannot be written"),
        ],
    )
    def test_wrong_options_of_score(self, model, texts, run, arguments, message):
        code, out, err = run(texts, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err

    def test_no_such_file(self, model, tmp_path, run):
        assert "absent: cannot be read: No such file" in run(tmp_path / "absent")[2]


class TestResuming:
    @pytest.fixture(params=[[], ["--words"], ["--format", "tsv"], ["--format", "tsv", "--words"]], ids=" ".join)
    def options(self, request):
        return request.param

    def test_from_every_byte(self, model, texts, tmp_path, run, options):
        """Wherever a run was interrupted, another one completes what it wrote."""
        path = tmp_path / "out"
        assert run(texts, "--output", path, *options)[0] == 0
        whole = path.read_bytes()
        assert whole.decode() == run(texts, *options)[1]
        for size in [*range(0, len(whole), 97), len(whole)]:
            path.write_bytes(whole[:size])
            assert run(texts, "--output", path, *options) == (0, "", "")
            assert path.read_bytes() == whole, size

    def test_only_what_is_missing_is_scored(self, model, texts, tmp_path, run):
        path = tmp_path / "out"
        run(texts, "--output", path)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:4]))
        model.score = lambda ids, mask: -np.log2(1 + ids[:, 1:]) if len(ids) == 2 else pytest.fail("more than two")
        assert run(texts, "--output", path)[0] == 0
        assert path.read_bytes() == b"".join(lines)

    def test_other_input_or_model(self, model, texts, tmp_path, run):
        path = tmp_path / "out"
        run(texts, "--output", path)
        whole = path.read_bytes()
        message = f"{path}: has other rows for line 5, from another input, checkpoint or option"
        model.scale = 1.2
        assert message in run(texts, "--output", path)[2]
        model.scale = 1.0
        assert f"{path}: has other rows for line 5" in run(texts, "--output", path, "--words")[2]
        texts.write_text("\n".join([*TEXTS[:4], "another"]), encoding="utf-8")
        assert message in run(texts, "--output", path)[2]
        texts.write_text("\n".join(TEXTS[:3]), encoding="utf-8")
        assert f"{path}: has rows up to line 5, but the input is shorter" in run(texts, "--output", path)[2]
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("content", ["notes\n", "notes", "1\t2\n", "line\tcount\tsum\tperplexity\ttext\n"])
    def test_other_files(self, model, texts, tmp_path, run, content):
        path = tmp_path / "out"
        path.write_text(content)
        assert f"{path}: row 1 does not belong to such an output" in run(texts, "--output", path)[2]
        assert path.read_text() == content

    def test_a_page_of_a_part(self, model, texts, tmp_path, run):
        run(texts, "--output", tmp_path / "out")
        code, _, err = run(texts, "--output", tmp_path / "out", "--html", tmp_path / "page.html")
        assert code == 2
        assert "--html shows what one run scores" in err


class Parser(HTMLParser):
    """The tags of a page, and the text of each paragraph that holds one of the user's."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append((tag, dict(attributes).get("class")))
        if self.open[-1] == ("p", "text"):
            self.text.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if ("p", "text") in self.open:
            self.text[-1] += data


class TestPage:
    @pytest.fixture
    def written(self, model, texts, tmp_path, run):
        path = tmp_path / "page.html"
        assert run(texts, "--html", path)[0] == 0
        return path

    def test_content(self, written):
        content = written.read_text(encoding="utf-8")
        parser = Parser()
        parser.feed(content)
        assert not parser.open
        assert parser.text == TEXTS
        assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parser.tags}
        assert "http" not in content
        assert "url(" not in content
        titles = [attributes["title"] for tag, attributes in parser.tags if "title" in attributes]
        words = [word for score in expected(TEXTS) for word in score.words]
        assert titles == [f"{word.bits:.2f} bits" for word in words]
        assert sum(tag == "p" and attributes.get("dir") == "auto" for tag, attributes in parser.tags) == len(TEXTS)

    @pytest.mark.parametrize("colours", [html_page.LIGHT, html_page.DARK], ids=["light", "dark"])
    def test_contrast(self, colours):
        """What WCAG asks of text: 4.5 to 1. And each shade differs from the one before."""
        text, *backgrounds = map(luminance, colours)
        for background in backgrounds:
            high, low = max(text, background), min(text, background)
            assert (high + 0.05) / (low + 0.05) >= 4.5
        assert backgrounds in (sorted(backgrounds), sorted(backgrounds, reverse=True))
        assert len({*backgrounds}) == len(backgrounds) == len(html_page.STEPS) + 1

    def test_in_a_browser(self, written):
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if browser is None:
            pytest.skip("no Chromium here; the page is parsed in test_content")
        shown = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", written.as_uri()],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HOME": str(written.parent)},
        ).stdout
        parser = Parser()
        parser.feed(shown)
        assert parser.text == TEXTS


def luminance(colour):
    """The relative luminance of "#rrggbb"."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
