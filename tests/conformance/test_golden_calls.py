"""The oracle and its gradients against what transformers computes for calls with arguments beyond ids and a mask."""

import numpy as np
import pytest

from conformance.calls import CALL_CASES
from conformance.golden import call_digest, call_numbers, load_call
from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights
from xglm_core.compare import oracle
from xglm_core.compare.report import load_tolerances

# Each gradient relative to its largest entry. The way back rounds as often as the way forth, to which `golden` belongs:
# up to 1.7e-6 here. Both sides are fixed numbers, so this leaves room for numbers made on another machine alone.
GRADIENT_TOLERANCE = 2 * load_tolerances().golden

BY_NAME = {case.name: case for case in CALL_CASES}


def compute(case, **changes):
    """The numbers of a call by the oracle, with some arguments changed, and the names of the gradients."""
    read = random_weights(case.config, case.seed).__getitem__
    arguments = {**case.arguments, **changes}
    labels = arguments.pop("labels", None)
    output = oracle.forward(case.config, read, **arguments, attentions=True)
    loss, gradients = None, {}
    if labels is not None:
        loss = oracle.loss(output.logits, labels, attention_mask=arguments["attention_mask"])
        _, gradients = loss_and_gradients(case.config, read, labels=labels, **{"input_ids": None, **arguments})
    states = (output.hidden_states, output.attentions, output.cross_attentions)
    return call_numbers(case, output.logits, *states, loss, gradients), sorted(gradients)


def error(ours, expected):
    """Largest difference, relative to the largest number that is expected."""
    return np.abs(ours - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", CALL_CASES, ids=lambda case: case.name)
def test_calls_are_those_of_transformers(case):
    golden = load_call(case)
    digest = golden.pop("digest").item()
    assert digest == call_digest(case), "the case has changed since its golden numbers were made: make golden"
    assert "transformers 4.57.6" in golden.pop("versions").item()
    ours, names = compute(case)
    assert ours.keys() == golden.keys()
    for key in ours.keys() - {"gradients"}:
        assert ours[key].shape == golden[key].shape
        # Layer by layer where there are layers: one scale for all would hide errors in the first.
        layered = key.endswith(("states", "attentions"))
        for one, other in zip(ours[key], golden[key], strict=True) if layered else [(ours[key], golden[key])]:
            assert error(one, other) < load_tolerances().golden, key
    assert_gradients_equal(ours.get("gradients", ()), golden.get("gradients", ()), names)


def assert_gradients_equal(ours, golden, names):
    expected = dict(zip(names, golden, strict=True))
    for name, gradient in zip(names, ours, strict=True):
        # A key bias has none but what rounding leaves, so its scale is that of the weight beside it.
        scale = np.abs(expected[name.replace("k_proj.bias", "k_proj.weight")]).max()
        assert np.abs(gradient - expected[name]).max() < GRADIENT_TOLERANCE * scale, name


STATES = {"logits", "hidden_states", "attentions"}
LEARNT = {"loss", "gradients"}


@pytest.mark.parametrize(
    ("name", "argument", "value", "expected"),
    [
        ("head_mask", "head_mask", None, STATES),
        ("cross_attention", "head_mask", None, STATES | {"cross_attentions"} | LEARNT),
        ("cross_attention", "cross_attn_head_mask", None, STATES | {"cross_attentions"} | LEARNT),
        ("cross_attention", "encoder_attention_mask", None, STATES | {"cross_attentions"} | LEARNT),
        ("cross_attention", "attention_mask", None, STATES | {"cross_attentions"} | LEARNT),
        ("inputs_embeds", "position_ids", np.zeros((3, 11), np.int64), STATES | LEARNT),
        (
            "inputs_embeds",
            "inputs_embeds",
            BY_NAME["inputs_embeds"].arguments["inputs_embeds"] * 35**0.5,
            STATES | LEARNT,
        ),
        # Unshifted or not ignored.
        ("labels", "labels", np.roll(BY_NAME["labels"].arguments["labels"], -1, axis=1), LEARNT),
        ("cross_attention", "labels", BY_NAME["cross_attention"].arguments["input_ids"], LEARNT),
    ],
)
def test_golden_numbers_tell_a_wrong_argument(name, argument, value, expected):
    case = BY_NAME[name]
    ours, _ = compute(case, **{argument: value})
    golden = load_call(case)
    assert {key for key in ours if error(ours[key], golden[key]) > 100 * GRADIENT_TOLERANCE} == expected


@pytest.mark.parametrize("case", CALL_CASES, ids=lambda case: case.name)
def test_default_positions_follow_the_mask(case):
    np.testing.assert_array_equal(compute(case, position_ids=None)[0]["logits"], compute(case)[0]["logits"])
