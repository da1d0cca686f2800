"""`xglm compare`: its arithmetic on made data, and the whole command on a backend that is wrong on purpose."""

import contextlib
import json
import types
from dataclasses import replace

import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.commands import ROOT, run_xglm
from tests.helpers.frameworks import backends_under_test, needs_a_backend
from xglm_core import XGLMConfig, XGLMTokenizer, open_checkpoint
from xglm_core.compare.adapters import BackendModel
from xglm_core.compare.divergence import find_partings
from xglm_core.compare.oracle import OracleOutput, checkpoint_reader, forward
from xglm_core.compare.report import (
    Agreement,
    Worst,
    between_backends,
    compare_argmax,
    json_line,
    layer_table,
    load_tolerances,
    measure,
    table,
    worst_error,
)
from xglm_core.compare.run import Result, parse_backends, run_backend
from xglm_core.compare.worker import Job
from xglm_core.errors import BackendError, XGLMError

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=35, ffn_dim=53, num_layers=3, attention_heads=5)
REAL = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) != 0
TOLERANCES = load_tolerances()


@pytest.fixture
def expected():
    """Logits [2, 5, 7] whose largest absolute value at a real position is 4, and 1000 at padding."""
    logits = np.random.default_rng(0).uniform(-3, 3, (2, 5, 7))
    logits[1, 3, 2] = -4
    logits[0, 1, 5] = 1000
    return logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, CONFIG, seed=5)
    return folder


class TestWorstError:
    def test_equal_arrays(self, expected):
        assert worst_error(expected, expected, REAL).error == 0

    def test_error_and_place(self, expected):
        found = expected.copy()
        found[1, 4, 6] += 0.002
        found[0, 3, 0] -= 0.003
        worst = worst_error(found, expected, REAL)
        assert worst.index == (0, 3, 0)
        assert worst.error == pytest.approx(0.003 / 4)

    def test_padding_does_not_count(self, expected):
        found = expected.copy()
        found[0, 0] += 9
        assert worst_error(found, expected, REAL).error == 0

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("index", [(0, 0, 4), (1, 2, 3)], ids=["padding", "token"])
    def test_not_finite(self, expected, value, index):
        found = expected.copy()
        found[1, 1, 1] += 0.1
        found[index] = value
        assert worst_error(found, expected, REAL) == Worst(np.inf, index)

    def test_shapes_must_agree(self, expected):
        with pytest.raises(ValueError, match=r"expected an array \[2, 5, 7\], found \[2, 1, 7\]"):
            worst_error(expected[:, -1:], expected, REAL)

    def test_all_zero(self):
        zero = np.zeros((2, 5, 7))
        assert worst_error(zero + 0.5, zero, REAL).error == 0.5


class TestArgmax:
    def test_same(self, expected):
        assert compare_argmax(expected + 1, expected, REAL, 1e-3) == Agreement(positions=8, ties=0, different=0)

    @pytest.mark.parametrize(("margin", "ties", "different"), [(3e-3, 1, 0), (5e-3, 0, 1)])
    def test_tie_is_a_margin_below_the_tolerance(self, expected, margin, ties, different):
        expected[0, 4, :2] = 3.5, 3.5 - margin  # The limit is 1e-3 of the largest value, 4.
        found = expected.copy()
        found[0, 4, 1] = 3.6
        agreement = compare_argmax(found, expected, REAL, 1e-3)
        assert (agreement.ties, agreement.different) == (ties, different)
        assert agreement.percent == pytest.approx(100 * (1 - different / 8))

    def test_padding_does_not_count(self, expected):
        found = expected.copy()
        found[0, :2] *= -1
        assert compare_argmax(found, expected, REAL, 1e-3).different == 0


class TestMeasure:
    @pytest.fixture
    def oracle(self, expected):
        return OracleOutput(hidden_states=[expected[:, :, :5] * scale for scale in (1, 100, 7)], logits=expected)

    @pytest.fixture
    def result(self, oracle):
        """What a perfect backend computes: the oracle's numbers in float32."""
        logits = oracle.logits.astype(np.float32)
        states = np.stack(oracle.hidden_states).astype(np.float32)
        return Result(logits, states, logits.copy(), logits.copy(), None, seconds=1.0)

    def test_right_backend(self, result, oracle):
        measured = measure(result, oracle, REAL, TOLERANCES)
        assert measured.failures == ()
        assert 0 < measured.logits.error < 1e-7
        assert [layer.error < 1e-7 for layer in measured.layers] == [True] * 3

    @pytest.mark.parametrize("name", ["logits", "cached", "chunked"])
    def test_wrong_logit(self, result, oracle, name):
        wrong = getattr(result, name).copy()
        wrong[1, 2, 6] += 4 * 3e-5
        measured = measure(replace(result, **{name: wrong}), oracle, REAL, TOLERANCES)
        assert measured.failures == (f"{name}[1, 2, 6]: error 3.0e-05, tolerance 2e-05",)
        assert getattr(measured, name).index == (1, 2, 6)

    def test_wrong_layer(self, result, oracle):
        """Each layer has its own scale: 1e-3 is little beside the values of the second one, not of the third."""
        result.hidden_states[1:, 0, 3, 4] += 1e-3
        measured = measure(result, oracle, REAL, TOLERANCES)
        assert measured.worst_layer == 2
        assert len(measured.failures) == 1
        assert measured.failures[0].startswith("hidden_states[2][0, 3, 4]: error")

    def test_the_first_wrong_layer_is_named(self, result, oracle):
        result.hidden_states[1, 0, 3, 4] += 1
        result.hidden_states[2, 0, 3, 4] += 10
        (failure,) = measure(result, oracle, REAL, TOLERANCES).failures
        assert failure.startswith("hidden_states[1][0, 3, 4]")

    def test_not_a_number(self, result, oracle):
        result.logits[0, 0, 0] = np.nan
        measured = measure(result, oracle, REAL, TOLERANCES)
        assert measured.failures == ("logits[0, 0, 0]: error inf, tolerance 2e-05",)

    def test_another_likeliest_token(self, result, oracle):
        """Within the tolerance of the logits, so only the choice is wrong."""
        oracle.logits[1, 0, :2] = 3.5, 3.5 - 4 * 2.5e-5
        logits = oracle.logits.astype(np.float32)
        result = replace(result, logits=logits.copy(), cached=logits, chunked=logits)
        result.logits[1, 0, :2] = 3.5 - 4 * 1.5e-5, 3.5 - 4 * 1e-5
        measured = measure(result, oracle, REAL, TOLERANCES)
        assert measured.failures == ("another likeliest token at 1 of 8 positions",)

    def test_a_missing_layer(self, result, oracle):
        with pytest.raises(ValueError, match="zip"):
            measure(replace(result, hidden_states=result.hidden_states[:-1]), oracle, REAL, TOLERANCES)

    def test_layer_table(self, result, oracle):
        right = measure(result, oracle, REAL, TOLERANCES)
        result.hidden_states[1, 0, 3, 4] = np.inf
        wrong = measure(result, oracle, REAL, TOLERANCES)
        shallow = replace(right, layers=right.layers[:1])
        lines = layer_table({"torch": [right, shallow], "flax": [right, wrong]}).splitlines()
        assert [line.split()[0] for line in lines] == ["layer", "0", "1", "2"]
        assert lines[2].split()[1:] == [f"{right.layers[1].error:.1e}", "inf"]


def test_between_backends(expected):
    logits = {"torch": expected, "tf": expected.copy(), "flax": expected.copy()}
    logits["tf"][0, 2, 1] += 0.04
    logits["flax"][1, 4, 3] -= 0.08
    worst, pair = between_backends(logits, REAL)
    assert pair == ("torch", "flax")
    assert worst.index == (1, 4, 3)
    assert worst.error == pytest.approx(0.02)
    assert between_backends({"torch": expected}, REAL) is None


def test_table_aligns_its_columns():
    assert table(("a", "bb", ""), [("ccc", "d", "e"), ("f", "ggg", "")]) == "  a    bb\n  ccc  d    e\n  f    ggg"


def test_json_line_holds_only_json():
    line = json_line({"a": [np.inf, (1.5, float("nan"))], "b": {"c": True, "d": None}})
    assert line == '{"a": [null, [1.5, null]], "b": {"c": true, "d": null}}'


class TestPartings:
    MASK = np.array([[0, 1, 1], [1, 1, 1]])

    def find(self, checkpoint, **generated):
        rows = {name: np.array(ids) for name, ids in generated.items()}
        return find_partings(rows, self.MASK, CONFIG, checkpoint_reader(open_checkpoint(checkpoint)))

    def test_same_texts(self, checkpoint):
        ids = [[1, 7, 8, 20, 21], [4, 5, 6, 22, 2]]
        assert self.find(checkpoint, torch=ids, tf=ids) == [None, None]

    def test_all_rows_ended_earlier_in_one_backend(self, checkpoint):
        """There the padding that follows is missing."""
        partings = self.find(checkpoint, torch=[[1, 7, 8, 2], [4, 5, 6, 2]], tf=[[1, 7, 8, 2, 1], [4, 5, 6, 22, 23]])
        assert partings[0] is None
        assert partings[1].choices == {"torch": 2, "tf": 22}

    def test_margin(self, checkpoint):
        """The margin is the oracle's, after the text up to there, padding aside."""
        read = checkpoint_reader(open_checkpoint(checkpoint))
        logits = forward(CONFIG, read, np.array([[7, 8, 20]])).logits[0, -1]
        best, other = logits.argsort()[[-1, -4]].tolist()
        row = [4, 5, 6, 22, 23]
        parting, none = self.find(checkpoint, torch=[[1, 7, 8, 20, best], row], tf=[[1, 7, 8, 20, other], row])
        assert none is None
        assert (parting.token, parting.choices) == (1, {"torch": best, "tf": other})
        assert parting.margin == pytest.approx((logits[best] - logits[other]) / np.abs(logits).max())


def test_cached_pass_reads_the_end_token_by_token(monkeypatch):
    """Every position is read once, in order, with the cache of those before it."""
    calls = []

    class Model:
        def __call__(self, input_ids, attention_mask, past_key_values, use_cache):
            assert use_cache
            assert attention_mask.shape[1] == (past_key_values or 0) + input_ids.shape[1]
            calls.append(input_ids.tolist())
            return types.SimpleNamespace(logits=input_ids[..., None] * 10, past_key_values=attention_mask.shape[1])

    model = BackendModel.__new__(BackendModel)
    model._model, model._tensor, model._inference = Model(), np.asarray, contextlib.nullcontext
    ids = np.arange(24).reshape(2, 12)
    for logits in (model.cached(ids, np.ones_like(ids)), model.chunked(ids, np.ones_like(ids), [5, 1, 6])):
        np.testing.assert_array_equal(logits[..., 0], ids * 10)
    assert [len(call[0]) for call in calls] == [4, 1, 1, 1, 1, 1, 1, 1, 1, 5, 1, 6]


# Two backends of numpy alone, in the places of `xglm_torch` and `xglm_tf`: the oracle, with one error on demand.
_FAKES = {
    "torch": """
from contextlib import nullcontext as inference_mode

__version__ = "0.0"


def from_numpy(array):
    return array
""",
    "tensorflow": """
__version__ = "0.1"


def convert_to_tensor(array):
    return array
""",
    "keras": """
__version__ = "0.2"
""",
    "xglm_torch": """
import os
import signal
import types
import numpy as np
from xglm_core import open_checkpoint
from xglm_core.compare.oracle import checkpoint_reader, forward
from xglm_core.errors import CheckpointError

WRONG = os.environ["WRONG"]


class XGLMForCausalLM:
    @classmethod
    def from_pretrained(cls, folder, dtype, weights):
        if WRONG == "input":
            raise CheckpointError("this checkpoint is not to my taste")
        model = cls()
        model.checkpoint = open_checkpoint(folder)
        return model

    def __call__(self, input_ids, attention_mask, past_key_values=None, use_cache=False, output_hidden_states=False):
        if WRONG == "memory":
            os.kill(os.getpid(), signal.SIGKILL)
        if WRONG == "bug":
            raise ZeroDivisionError("a bug in the backend")
        ids = input_ids if past_key_values is None else np.concatenate([past_key_values, input_ids], axis=1)
        output = forward(self.checkpoint.config, checkpoint_reader(self.checkpoint), ids, attention_mask)
        logits = output.logits[:, -input_ids.shape[1] :].astype(np.float32)
        hidden_states = [state.astype(np.float32) for state in output.hidden_states]
        if WRONG == "cache" and past_key_values is not None:
            logits *= 1.01
        if WRONG == "layer":
            hidden_states[2][1, -1, 3] += 7
        return types.SimpleNamespace(logits=logits, hidden_states=hidden_states, past_key_values=ids)

    def generate(self, input_ids, attention_mask, max_new_tokens):
        for _ in range(max_new_tokens):
            logits = self(input_ids, attention_mask).logits[:, -1]
            input_ids = np.concatenate([input_ids, logits.argmax(axis=-1)[:, None]], axis=1)
            attention_mask = np.pad(attention_mask, ((0, 0), (0, 1)), constant_values=1)
        return input_ids
""",
    "xglm_tf": """
from xglm_torch import WRONG, XGLMForCausalLM


class TFXGLMForCausalLM(XGLMForCausalLM):
    def generate(self, input_ids, attention_mask, max_new_tokens):
        ids = super().generate(input_ids, attention_mask, max_new_tokens)
        if WRONG == "text":
            ids[1, -2] = 9
        return ids
""",
}


@pytest.fixture
def compare_fakes(checkpoint, tmp_path):
    """Runs `xglm compare` on the two fake backends; returns exit code, lines of stdout, stderr."""
    for name, text in _FAKES.items():
        (tmp_path / "fakes" / name).mkdir(parents=True)
        (tmp_path / "fakes" / name / "__init__.py").write_text(text)

    def run(*arguments, wrong="", backends="torch,tf", folder=checkpoint):
        done = run_xglm(
            *("compare", folder, "--backends", backends, *arguments), path=[tmp_path / "fakes"], WRONG=wrong
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


IDS = ("--ids", "2,31,44,7,9", "--ids", "2,8,5")


class TestCommand:
    def test_right_backends(self, compare_fakes):
        code, (*printed, line), stderr = compare_fakes(*IDS, "--new-tokens", "3")
        assert (code, stderr) == (0, "")
        assert printed[-1] == "PASS: torch and tf agree with the oracle"
        assert printed.count("         (the same text in torch and tf)") == 2
        numbers = json.loads(line)
        assert numbers["passed"]
        assert numbers["versions"] == {"torch": {"torch": "0.0"}, "tf": {"tensorflow": "0.1", "keras": "0.2"}}
        assert numbers["input_ids"] == [[2, 31, 44, 7, 9], [1, 1, 2, 8, 5]]
        assert numbers["generated"]["torch"] == numbers["generated"]["tf"]
        assert np.shape(numbers["generated"]["tf"]) == (2, 8)
        assert numbers["partings"] == [None, None]
        assert numbers["between_backends"]["error"] == 0
        for measurement in numbers["backends"].values():
            assert measurement["argmax"] == {"positions": 8, "ties": 0, "different": 0}
            assert len(measurement["layers"]) == CONFIG.num_layers + 1

    def test_texts(self, compare_fakes, tmp_path):
        """Each text stands as the user wrote it, whatever the vocabulary knows, before what each backend adds."""
        folder = tmp_path / "checkpoint"
        tokenizer = XGLMTokenizer.from_pretrained(ROOT / "examples" / "tiny_model" / "checkpoint")
        tokenizer.save_pretrained(folder)
        write_checkpoint(folder, XGLMConfig(**{**vars(CONFIG), "vocab_size": len(tokenizer)}), seed=5)
        arguments = ("--text", "♞ The children", "--text", "孩子们", "--new-tokens", "3")
        code, printed, _ = compare_fakes(*arguments, folder=folder)
        assert code == 0
        ids = np.array(json.loads(printed[-1])["generated"]["tf"])
        assert ids[1, 0] == tokenizer.pad_token_id
        for text, new in zip(("♞ The children", "孩子们"), ids[:, -3:], strict=True):
            first = next(i for i, line in enumerate(printed) if line.startswith(f"  torch  {text}"))
            added = printed[first].removeprefix(f"  torch  {text}")
            assert added.strip() == tokenizer.decode(new, skip_special_tokens=True)
            assert printed[first + 1] == f"  tf     {text}{added}"
            assert printed[first + 2] == "         (the same text in torch and tf)"

    def test_other_text_in_one_backend(self, compare_fakes):
        code, printed, _ = compare_fakes(*IDS, "--new-tokens", "3", wrong="text")
        assert code == 1
        assert "         (they part at new token 2)" in printed
        assert any(line.startswith("FAIL: text 2: another new token 2, and no tie") for line in printed)

    def test_json_file(self, compare_fakes, tmp_path):
        code, printed, _ = compare_fakes(*IDS, "--json", tmp_path / "numbers.json")
        assert code == 0
        assert "{" not in "".join(printed)
        assert json.loads((tmp_path / "numbers.json").read_text())["passed"]

    def test_json_file_that_cannot_be_written(self, compare_fakes, tmp_path):
        code, _, stderr = compare_fakes(*IDS, "--json", tmp_path)
        assert (code, stderr) == (2, f"xglm: error: {tmp_path}: cannot be written: Is a directory\n")

    def test_wrong_cache(self, compare_fakes):
        code, printed, _ = compare_fakes(*IDS, wrong="cache", backends="torch")
        assert code == 1
        numbers = json.loads(printed[-1])
        assert not numbers["passed"]
        assert [failure.partition("[")[0] for failure in numbers["failures"]] == ["torch cached", "torch chunked"]

    def test_wrong_layer(self, compare_fakes):
        code, printed, _ = compare_fakes(*IDS, wrong="layer", backends="torch")
        assert code == 1
        assert printed[-2].startswith("FAIL: torch hidden_states[2][1, 4, 3]: error")

    def test_error_of_the_input_in_a_backend_is_one_line(self, compare_fakes):
        code, _, stderr = compare_fakes(*IDS, wrong="input")
        assert (code, stderr) == (2, "xglm: error: torch: this checkpoint is not to my taste\n")

    def test_killed_backend_is_one_line(self, compare_fakes):
        code, _, stderr = compare_fakes(*IDS, wrong="memory")
        assert code == 2
        assert stderr.startswith("xglm: error: the torch process was killed, as happens when memory runs out")

    def test_bug_in_a_backend_keeps_its_traceback(self, compare_fakes):
        code, _, stderr = compare_fakes(*IDS, wrong="bug")
        assert code == 1
        assert "the torch backend failed" in stderr
        assert "ZeroDivisionError: a bug in the backend" in stderr

    def test_one_token(self, compare_fakes):
        code, printed, _ = compare_fakes("--ids", "2", backends="torch")
        assert (code, printed[-2]) == (0, "PASS: torch agrees with the oracle")


def test_parse_backends():
    with pytest.raises(BackendError, match="no backend 'keras'"):
        parse_backends("keras")
    for name in backends_under_test():
        assert parse_backends(f"{name}, {name}") == [name]


@pytest.mark.parametrize("backend", backends_under_test())
def test_worker_reports_errors_of_the_input(backend, tmp_path):
    with pytest.raises(XGLMError, match=f"^{backend}: .*no such folder"):
        run_backend(backend, [Job(str(tmp_path / "absent"), [[2]], None, [1])], tmp_path)


@needs_a_backend
def test_all_backends(checkpoint):
    """The whole command on real frameworks; the conformance suite judges the numbers in depth."""
    names = ",".join(backends_under_test())
    run = run_xglm("compare", checkpoint, "--backends", names, "--new-tokens", 4, *IDS)
    assert (run.returncode, run.stderr) == (0, "")
    numbers = json.loads(run.stdout.splitlines()[-1])
    assert list(numbers["backends"]) == backends_under_test()
    assert len({json.dumps(ids) for ids in numbers["generated"].values()}) == 1
