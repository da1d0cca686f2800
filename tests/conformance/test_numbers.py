"""Outputs, loss and gradients of every backend: against the float64 oracle, transformers, and each other."""

import numpy as np
import pytest

from conformance.calls import CALL_CASES
from conformance.cases import CASES, Case
from conformance.golden import call_numbers, load_call
from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.frameworks import Framework, backends_under_test
from tests.helpers.gradients import LOSS, assert_gradients_equal
from xglm_core.compare import oracle
from xglm_core.compare.report import load_tolerances

TRAINED = [
    case for case in CASES if case.name in ("mixed_padding", "relu", "silu", "gelu_new", "untied_head", "no_pad")
]
LEARNING = [case for case in CALL_CASES if "labels" in case.arguments]


def name_of(case):
    return case.name


def arguments_of(case):
    """The arguments of a call case; those of a case without labels, with some."""
    if not isinstance(case, Case):
        return case.arguments
    arguments = {"input_ids": case.input_ids, "attention_mask": case.attention_mask}
    labels = np.where(np.random.RandomState(case.seed).random_sample(case.input_ids.shape) < 0.2, -100, case.input_ids)
    if case.attention_mask is not None:
        labels[case.attention_mask == 0] = -100
    return {**arguments, "labels": labels}


def load(fw, case, folder):
    write_checkpoint(folder, case.config, case.seed)
    return fw.causal_lm.from_pretrained(folder)


def error(ours, expected):
    """Largest difference, relative to the largest number that is expected."""
    return np.abs(np.asarray(ours, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", CALL_CASES, ids=name_of)
def test_outputs_of_calls(fw, case, tmp_path):
    model = load(fw, case, tmp_path)
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    outputs = fw.call(model, **case.arguments, **options)
    read = random_weights(case.config, case.seed).__getitem__
    arguments = {name: value for name, value in case.arguments.items() if name != "labels"}
    reference = oracle.forward(case.config, read, **arguments, attentions=True)
    loss = None if outputs.loss is None else float(fw.numpy(outputs.loss))
    ours = call_numbers(
        case,
        fw.numpy(outputs.logits),
        *([fw.numpy(layer) for layer in outputs[name] or ()] if name in outputs else [] for name in LAYERED),
        None,
        {},
    )
    theirs = call_numbers(
        case, reference.logits, reference.hidden_states, reference.attentions, reference.cross_attentions, None, {}
    )
    golden = load_call(case)
    assert ours.keys() == theirs.keys()
    for key, numbers in ours.items():
        for expected in (theirs[key], golden[key]):
            assert numbers.shape == expected.shape
            for one, other in zip(numbers, expected, strict=True) if key != "logits" else [(numbers, expected)]:
                assert error(one, other) < load_tolerances().logits, key
    assert (loss is None) == ("labels" not in case.arguments)
    if loss is not None:
        assert loss == pytest.approx(oracle.loss(reference.logits, case.arguments["labels"]), rel=LOSS)
        assert loss == pytest.approx(golden["loss"].item(), rel=LOSS)


LAYERED = ("hidden_states", "attentions", "cross_attentions")


@pytest.mark.parametrize("case", [*LEARNING, *TRAINED], ids=name_of)
def test_loss_and_gradients(fw, case, tmp_path):
    arguments = arguments_of(case)
    loss, gradients = fw.loss_and_gradients(load(fw, case, tmp_path), **arguments)
    read = random_weights(case.config, case.seed).__getitem__
    expected_loss, expected = loss_and_gradients(case.config, read, **{"input_ids": None, **arguments})
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)


def test_num_items_in_batch(fw, tmp_path):
    case = LEARNING[-1]
    model, read = load(fw, case, tmp_path), random_weights(case.config, case.seed).__getitem__
    loss, gradients = fw.loss_and_gradients(model, **case.arguments, num_items_in_batch=37)
    expected_loss, expected = loss_and_gradients(case.config, read, **case.arguments, num_items_in_batch=37)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)


@pytest.mark.parametrize("labels", ["none counts", "one token"])
def test_nothing_to_learn_from(fw, model, labels):
    ids = np.array([[7, 8, 9]]) if labels == "none counts" else np.array([[7]])
    targets = np.full_like(ids, -100) if labels == "none counts" else ids
    loss, gradients = fw.loss_and_gradients(model, input_ids=ids, labels=targets)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.skipif(len(backends_under_test()) < 2, reason="needs two backends")
@pytest.mark.parametrize("case", LEARNING, ids=name_of)
def test_backends_agree(case, tmp_path):
    results = []
    for backend in backends_under_test():
        fw = Framework(backend)
        results.append(fw.loss_and_gradients(load(fw, case, tmp_path), **case.arguments))
    (first_loss, first), *others = results
    for loss, gradients in others:
        assert loss == pytest.approx(first_loss, rel=LOSS)
        assert_gradients_equal(gradients, first)
