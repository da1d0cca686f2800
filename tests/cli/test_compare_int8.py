"""`xglm compare --quantization int8`: what matrices of int8 change."""

import json
import math

import numpy as np
import pytest

from tests.helpers.commands import ROOT, assert_refused, run_xglm
from tests.helpers.frameworks import backends_under_test, needs_a_backend
from xglm_core import convert_checkpoint
from xglm_core.compare.quantized import measure_change

TINY = ROOT / "examples" / "tiny_model" / "checkpoint"
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps for the rest of the day.",
    "In the beginning there was nothing but water, and the people of the village had to build boats.",
    "Am Morgen ging er in die Stadt, um Brot und Milch zu kaufen, und kam am Abend zurück.",
    "El niño y su madre caminaron por la calle hasta que llegaron a la casa de su abuela.",
)


@needs_a_backend
def test_the_bundled_model_loses_less_than_one_percent():
    texts = [word for text in TEXTS for word in ("--text", text)]
    backend = backends_under_test()[0]
    run = run_xglm("compare", TINY, *texts, "--quantization", "int8", "--backends", backend)
    assert run.returncode == 0, run.stdout + run.stderr
    change = json.loads(run.stdout.splitlines()[-1])["changes"][backend]
    assert change["targets"] > 80
    assert change["before"] > 2
    assert 0.99 < change["ratio"] < 1.01
    assert change["ratio"] != 1
    assert change["same"] / change["targets"] > 0.95
    assert f"{change['ratio']:.4f}" in run.stdout


@needs_a_backend
def test_int8_is_not_quantized_again(tmp_path):
    convert_checkpoint(TINY, tmp_path / "int8", to="safetensors", dtype="int8")
    run = run_xglm("compare", tmp_path / "int8", "--ids", "2,4,5", "--quantization", "int8")
    assert_refused(run, "is int8; --quantization needs the checkpoint of floats")


def test_the_formula():
    logits = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    other = logits.copy()
    other[1, 1] = other[1, 1, ::-1]
    ids = np.array([[0, 1, 2, 3], [4, 0, 1, 2]])
    real = np.array([[False, False, True, True], [True, True, True, True]])
    # Row 0 predicts its last token alone, from position 2; row 1 its last three.
    pairs = [(0, 2, 3), (1, 0, 0), (1, 1, 1), (1, 2, 2)]
    found = measure_change(other, logits, ids, real)
    assert found.targets == 4
    for value, array in ((found.before, logits), (found.after, other)):
        p = np.exp(array.astype(np.float64)) / np.exp(array.astype(np.float64)).sum(axis=2, keepdims=True)
        expected = math.exp(-sum(math.log(p[place]) for place in pairs) / 4)
        assert value == pytest.approx(expected)
    assert found.same == 3
    assert measure_change(other, logits, ids, np.zeros((2, 4), bool)) is None
