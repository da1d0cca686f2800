"""Dropout on a CPU, and attention with it, against the operations that they stand for."""

import pytest
import torch

from tests.helpers.models import CONFIG, IDS, changed
from xglm_torch import XGLMForCausalLM
from xglm_torch.fast import attention
from xglm_torch.fast.attention import attends_with_dropout, attention_with_dropout
from xglm_torch.fast.dropout import dropped

RATE = 0.3
# Of float32 sums of up to 300 products of numbers near 1, compared with those in another order.
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

    def test_neighbours_are_independent(self):
        """Four masks come from one number."""
        torch.manual_seed(0)
        kept = (dropped(torch.ones(40000), 0.5) != 0).double()
        for distance in (1, 2, 3, 4):
            # The mean of 40,000 products of two fair coins has a standard deviation of 0.0022.
            assert abs((kept[distance:] * kept[:-distance]).mean() - 0.25) < 0.015

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


def plain(query, key, value, mask, factors):
    """The same attention, each operation by itself, for masks that are known."""
    scores = query @ key.mT * query.shape[3] ** -0.5
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * factors @ value


@pytest.fixture
def factors(monkeypatch):
    """The factors of all probabilities, of which attention is given those that it asks for."""
    everything = (torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(1)) >= RATE).double()
    position = [0]

    def mask(like, rate):
        assert rate == RATE
        begin, position[0] = position[0], position[0] + like.shape[1]
        return everything[:, :, begin : position[0], : like.shape[2]].flatten(0, 1).bool(), 1 / (1 - rate)

    monkeypatch.setattr(attention, "random_mask", mask)
    return everything / (1 - RATE)


def inputs(length, keys):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, length, 7), (2, 3, keys, 7), (2, 3, keys, 7)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def masks(name):
    if name == "causal":
        return None, torch.ones(300, 300, dtype=torch.bool).tril()
    if name == "none":
        return None, torch.ones(300, 300, dtype=torch.bool)
    mask = torch.ones(2, 1, 300, 300, dtype=torch.bool).tril()
    mask[1, :, :, :170] = False  # Left padding: its own rows see nothing.
    return mask, mask


class TestAttention:
    @pytest.mark.parametrize("name", ["causal", "none", "padded"])
    def test_as_each_operation_by_itself(self, name, factors):
        arrays = inputs(300, 300)
        mask, shown = masks(name)
        ours = attention_with_dropout(*arrays, mask, RATE, is_causal=name == "causal")
        doubles = [array.detach().double().requires_grad_() for array in arrays]
        theirs = plain(*doubles, shown, factors)
        torch.testing.assert_close(ours.double(), theirs, **CLOSE)
        slope = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
        ours.backward(slope)
        theirs.backward(slope.double())
        for array, double in zip(arrays, doubles, strict=True):
            torch.testing.assert_close(array.grad.double(), double.grad, **CLOSE)

    def test_second_derivatives(self, factors):
        arrays = inputs(300, 300)
        mask, shown = masks("padded")

        def penalty(context, arrays):
            gradients = torch.autograd.grad(context.square().sum(), arrays, create_graph=True)
            return sum(gradient.square().sum() for gradient in gradients)

        penalty(attention_with_dropout(*arrays, mask, RATE), arrays).backward()
        doubles = [array.detach().double().requires_grad_() for array in arrays]
        penalty(plain(*doubles, shown, factors), doubles).backward()
        for array, double in zip(arrays, doubles, strict=True):
            torch.testing.assert_close(array.grad.double(), double.grad, rtol=1e-3, atol=1e-3)

    def test_second_derivatives_beside_what_is_frozen(self, factors):
        query, key, value = inputs(300, 300)
        query.requires_grad_(False)
        context = attention_with_dropout(query, key, value, None, RATE)
        gradients = torch.autograd.grad(context.square().sum(), (key, value), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        assert query.grad is None
        assert key.grad.any()
        assert value.grad.any()

    def test_default_device_is_not_asked(self, factors):
        arrays = inputs(300, 300)
        with torch.device("meta"):
            assert attention_with_dropout(*arrays, None, RATE, is_causal=True).device.type == "cpu"

    def test_where_it_is_used(self):
        states = torch.randn(2, 3, 5, 7)
        assert attends_with_dropout(states, RATE)
        assert not attends_with_dropout(states.bfloat16(), RATE)
        assert not attends_with_dropout(states.to("meta"), RATE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not attends_with_dropout(states, RATE)

    def test_model_trains_through_it(self, monkeypatch):
        calls = []
        monkeypatch.setattr(attention._Attention, "apply", lambda query, *_: calls.append(query.shape) or query)
        model = XGLMForCausalLM(changed(CONFIG, attention_dropout=RATE)).train()
        model(torch.from_numpy(IDS), labels=torch.from_numpy(IDS))
        assert len(calls) == model.config.num_layers
