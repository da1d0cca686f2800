"""Dropout, and attention with it, against the operations that they stand for."""

import pytest
import torch

from tests.helpers.models import CONFIG, IDS, changed
from xglm_torch import XGLMForCausalLM
from xglm_torch.attention import XGLMAttention
from xglm_torch.dropout import dropped

RATE = 0.3
# Of float32 sums of products of numbers near 1, compared with those in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class TestDropped:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("rate", [0.1, 0.5])
    def test_how_many_and_by_what(self, dtype, rate):
        torch.manual_seed(0)
        states = torch.ones(7, 11, 1009, dtype=dtype)
        result = dropped(states, rate)
        assert result.dtype == dtype
        kept = result != 0
        # 77,693 draws: the share has a standard deviation of at most 0.0018.
        assert abs(kept.double().mean() - (1 - rate)) < 0.01
        torch.testing.assert_close(result[kept], torch.full_like(result[kept], 1 / (1 - rate)), rtol=1e-2, atol=0)

    def test_gradient_has_the_same_mask(self):
        states = torch.randn(5, 13, requires_grad=True)
        result = dropped(states, RATE)
        result.sum().backward()
        torch.testing.assert_close(states.grad * states, result)

    def test_default_device_is_not_asked(self):
        states = torch.randn(17)
        with torch.device("meta"):
            assert dropped(states, RATE).device.type == "cpu"

    def test_rates_of_zero_and_one(self):
        states = torch.randn(17)
        assert dropped(states, 0.0) is states
        assert not dropped(states, 1.0).any()

    def test_mask_is_all_that_is_kept(self):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            dropped(torch.randn(1000, requires_grad=True), RATE)
        assert sum(sizes) == 1000


def test_attention_drops_probabilities():
    """As each operation by itself, with the same draws."""
    attention = XGLMAttention(changed(CONFIG, attention_dropout=RATE), list(range(5)), is_causal=True).train()
    states = torch.randn(2, 11, CONFIG.d_model, requires_grad=True)
    key, value = attention.keys_and_values(states)
    torch.manual_seed(0)
    found, _ = attention(states, key, value, None)
    torch.manual_seed(0)
    query = attention.q_proj(states).unflatten(2, (5, 7)).transpose(1, 2)
    scores = (query @ key.mT / 7**0.5).masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), -torch.inf)
    factors = dropped(torch.ones_like(scores), RATE)
    assert 0.6 < (factors != 0).double().mean() < 0.8  # 1,210 draws: a standard deviation of 0.013.
    expected = attention.out_proj((scores.softmax(-1) * factors @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, **CLOSE)
    gradients = (torch.autograd.grad(each.square().sum(), states, retain_graph=True) for each in (found, expected))
    torch.testing.assert_close(*gradients, **CLOSE)


def test_models_train():
    model = XGLMForCausalLM(changed(CONFIG, attention_dropout=RATE)).train()
    model(torch.from_numpy(IDS), labels=torch.from_numpy(IDS)).loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())
