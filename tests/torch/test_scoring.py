"""What only PyTorch has: products through oneDNN, and heads that are more than their weight."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import CONFIG, IDS, SAME
from xglm_torch import XGLMForCausalLM
from xglm_torch.fast import linear as products

HAS_BOTH = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


class Operations(TorchDispatchMode):
    """Notes the operations that are computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(states, weight, bias=None):
    with Operations() as seen:
        result = products.linear(states, weight, bias)
    return result, any("_linear_pointwise" in name for name in seen.names)


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5, 7), (11, 7), (11,))]


class TestProducts:
    @pytest.fixture(autouse=True)
    def onednn(self, monkeypatch):
        monkeypatch.setattr(products, "takes_onednn", lambda rows, elements: True)

    @torch.inference_mode()
    @pytest.mark.parametrize("shape", [(3, 5, 7), (15, 7), (1, 7), (7,), (0, 7), (2, 0, 7)])
    @pytest.mark.parametrize("with_bias", [True, False])
    def test_numbers(self, factors, shape, with_bias):
        _, weight, bias = factors
        states = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape) / 10
        bias = bias if with_bias else None
        result, redirected = operations(states, weight, bias)
        assert redirected is HAS_BOTH
        torch.testing.assert_close(result, F.linear(states, weight, bias))

    @torch.inference_mode()
    def test_layouts(self, factors):
        states, weight, bias = factors
        for one in (states.transpose(0, 1), states[:1].expand(4, 5, 7), states[:, ::2]):
            for other in (weight, weight.T.contiguous().T, weight[::2]):
                result, _ = operations(one, other, bias[: len(other)])
                torch.testing.assert_close(result, F.linear(one, other, bias[: len(other)]))

    @pytest.mark.parametrize("faster", [True, False])
    def test_gradients_are_kept(self, factors, faster, monkeypatch):
        monkeypatch.setattr(products, "takes_onednn", lambda rows, elements: faster)
        states, weight, bias = factors
        weight.requires_grad_()
        result, redirected = operations(states, weight, bias)
        assert redirected is (HAS_BOTH and faster)
        result.sum().backward()
        assert weight.grad is not None

    @torch.inference_mode()
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_types_stay_as_they_are(self, factors, dtype):
        _, redirected = operations(*(factor.to(dtype) for factor in factors))
        assert not redirected

    def test_only_what_is_asked(self, factors):
        XGLMForCausalLM(CONFIG).score(torch.from_numpy(IDS))
        with torch.inference_mode(), Operations() as seen:
            F.linear(*factors)
        assert not any("_linear_pointwise" in name for name in seen.names)

    @torch.inference_mode()
    def test_only_the_number_of_rows_that_is_faster(self, monkeypatch):
        monkeypatch.setattr(products, "takes_onednn", lambda rows, elements: rows > 1)
        layer = products.FastLinear(7, 11)
        for shape, fast in (((1, 1, 7), False), ((2, 1, 7), HAS_BOTH)):
            with Operations() as seen:
                layer(torch.ones(shape))
            assert any("_linear_pointwise" in name for name in seen.names) is fast


class TestHeads:
    def check(self, model):
        ids = torch.from_numpy(IDS)
        with torch.inference_mode():
            logits = model(ids).logits[:, :-1]
        expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        np.testing.assert_allclose(model.score(ids).numpy(), expected.numpy(), **SAME)

    def test_a_hook(self, folder):
        model = XGLMForCausalLM.from_pretrained(folder)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
        self.check(model)

    def test_a_head_of_another_class(self, folder):
        model = XGLMForCausalLM.from_pretrained(folder)

        class Shifted(torch.nn.Linear):
            def forward(self, states):
                return super().forward(states) + torch.arange(131)

        plain, model.lm_head = model.lm_head, Shifted(35, 131, bias=False)
        model.lm_head.weight = plain.weight
        self.check(model)

    def test_no_gradients(self, folder):
        model = XGLMForCausalLM.from_pretrained(folder)
        assert not model.score(torch.from_numpy(IDS)).requires_grad
        model(torch.from_numpy(IDS)).logits.sum().backward()  # Not stopped by a tensor of inference.
