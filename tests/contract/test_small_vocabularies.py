"""Vocabularies of fewer than 100 ids, in which -100 is no place at all: character models, and others' tests."""

import importlib

import numpy as np
import pytest

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights
from tests.helpers.gradients import LOSS, assert_gradients_equal
from tests.helpers.models import CONFIG, changed
from xglm_core.compare import oracle
from xglm_core.loss import LossOptions

MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1]])


def config_of(vocab_size):
    tokens = {"bos_token_id": 0, "eos_token_id": vocab_size - 1, "decoder_start_token_id": 0}
    return changed(CONFIG, vocab_size=vocab_size, num_layers=1, dropout=0.0, attention_dropout=0.0, **tokens)


def batch_of(vocab_size):
    """Rows with the first and the last id among the targets, ignored labels, padding and a gap."""
    ids = np.random.RandomState(vocab_size).randint(0, vocab_size, MASK.shape)
    ids[0, 3:5], ids[1, 1:3] = (0, vocab_size - 1), (vocab_size - 1, 0)
    labels = np.where(MASK == 1, ids, -100)
    labels[0, 6] = -100
    return {"input_ids": ids, "attention_mask": MASK, "labels": labels}


@pytest.mark.parametrize("vocab_size", [2, 53, 99, 101])
def test_loss_and_gradients(fw, load, vocab_size):
    config, batch = config_of(vocab_size), batch_of(vocab_size)
    model = load(config)
    options = {"label_smoothing": 0.125, "z_loss": 0.01} if vocab_size in (2, 99) else {}
    model.loss_options = LossOptions(**options)
    loss, gradients = fw.loss_and_gradients(model, **batch)
    read = random_weights(config, 1).__getitem__
    expected_loss, expected = loss_and_gradients(config, read, **batch, **options)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_gradients_equal(gradients, expected)
    if fw.name == "torch":  # Its other ways to the same loss.
        for way in (adapted, each_example):
            assert way(fw, model, batch) == pytest.approx(expected_loss, rel=LOSS), way.__name__


def adapted(fw, model, batch):
    """A head of which nothing is known."""
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    loss = float(fw.numpy(fw.call(model, **batch).loss))
    handle.remove()
    return loss


def each_example(fw, model, batch):
    """As transforms of `torch.func` see it: the sum over the rows of those of each, of seven labels that count."""
    torch = importlib.import_module("torch")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(ids, mask, labels):
        arguments = {"attention_mask": mask[None], "labels": labels[None], "num_items_in_batch": 7, "use_cache": False}
        return torch.func.functional_call(model, parameters, (ids[None],), arguments).loss

    return float(torch.func.vmap(loss)(*map(fw.tensor, batch.values())).sum())


@pytest.mark.parametrize("vocab_size", [2, 53])
def test_score_metrics_and_texts(fw, load, vocab_size):
    config, batch = config_of(vocab_size), batch_of(vocab_size)
    model, ids = load(config), batch["input_ids"]
    read = random_weights(config, 1).__getitem__
    logits = oracle.forward(config, read, ids).logits
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(logs[:, :-1], ids[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(model.score(ids)), own, rtol=0, atol=1e-5)
    for options in ({}, {"do_sample": True, "num_beams": 2, "top_p": 0.9}):
        texts = fw.generate(model, ids, max_new_tokens=3, min_new_tokens=1, **options)[:, 7:]
        assert texts.min() >= 0
        assert texts.max() < vocab_size
    if fw.name == "torch":
        return
    # Without padding and the first label, which are judged elsewhere.
    labels = np.where(np.arange(7) % 3 == 2, -100, ids)
    counted = labels[:, 1:] != -100
    found = EVALUATE[fw.name](model, {"input_ids": ids, "labels": labels})
    correct = (logits[:, :-1].argmax(-1) == ids[:, 1:])[counted].mean()
    assert float(found["loss"]) == pytest.approx(-own[counted].mean(), rel=1e-5)
    assert float(found["accuracy"]) == pytest.approx(correct)
    assert float(found["perplexity"]) == pytest.approx(np.exp(-own[counted].mean()), rel=1e-5)


def tf_evaluate(model, batch):
    model.compile(jit_compile=False)
    return model.evaluate(batch, verbose=0, return_dict=True)


def flax_evaluate(model, batch):
    return importlib.import_module("xglm_flax").make_eval_step(model)(model.params, batch)


EVALUATE = {"tf": tf_evaluate, "flax": flax_evaluate}
