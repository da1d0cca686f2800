"""Fast forms and plain ones give what the formulas give."""

import numpy as np
import pytest
import torch
from torch import nn

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights, write_checkpoint
from tests.conformance.test_numbers import LOSS, assert_gradients_equal
from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from xglm_core.compare import oracle
from xglm_torch import XGLMForCausalLM
from xglm_torch.fast import linear

CERTAIN = changed(CONFIG, dropout=0.0, attention_dropout=0.0)
READ = random_weights(CERTAIN, seed=1).__getitem__
REAL = LEFT != 0


@pytest.fixture(params=["fast", "plain"])
def model(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XGLM_PLAIN", "1" if request.param == "plain" else "")
    monkeypatch.setattr(linear, "takes_onednn", lambda rows, elements: True)
    write_checkpoint(tmp_path, CERTAIN, seed=1)
    found = XGLMForCausalLM.from_pretrained(tmp_path)
    is_fast = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and request.param == "fast"
    assert type(found.model.layers[0].fc1) is type(found.lm_head) is (linear.FastLinear if is_fast else nn.Linear)
    return found


def test_logits_scores_and_texts(model):
    ids, mask = torch.from_numpy(IDS), torch.from_numpy(LEFT)
    logits = oracle.forward(CERTAIN, READ, IDS, LEFT).logits
    with torch.no_grad():
        np.testing.assert_allclose(model(ids, mask).logits.numpy()[REAL], logits[REAL], **SAME)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logs[:, :-1], IDS[:, 1:, None], axis=2)[..., 0]
    counts = REAL[:, 1:] & REAL[:, :-1]
    np.testing.assert_allclose(model.score(ids, mask).numpy()[counts], expected[counts], **SAME)
    for rows in (slice(0, 1), slice(0, 2)):
        found = model.generate(ids[rows], mask[rows], max_new_tokens=1, stop_at_eos=False)[:, -1]
        assert np.array_equal(found.numpy(), logits[rows, -1].argmax(-1))


def test_gradients(model):
    ids, mask = torch.from_numpy(IDS), torch.from_numpy(LEFT)
    loss = model.train()(ids, mask, labels=ids, use_cache=False).loss
    loss.backward()
    wanted, expected = loss_and_gradients(CERTAIN, READ, IDS, IDS, LEFT)
    assert loss.item() == pytest.approx(wanted, rel=LOSS)
    assert_gradients_equal({name: each.grad.numpy() for name, each in model.named_parameters()}, expected)
