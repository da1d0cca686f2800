"""What only PyTorch has in training: its compiler, other types, adapted heads, graphs that are used twice."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers import models
from tests.helpers.gradients import LOSS, assert_gradients_equal
from tests.helpers.models import CONFIG, changed
from xglm_core.errors import InputError
from xglm_core.loss import LossOptions
from xglm_torch import XGLMForCausalLM, chunked_loss
from xglm_torch.fast import linear as products
from xglm_torch.loss import causal_lm_loss

IDS = torch.from_numpy(models.IDS)
LABELS = torch.where(torch.from_numpy(np.random.RandomState(2).random_sample((2, 11))) < 0.4, -100, IDS)
PLAIN = changed(CONFIG, dropout=0.0, attention_dropout=0.0)
OPTIONS = LossOptions(label_smoothing=0.2, z_loss=0.01)


@pytest.fixture
def model(tmp_path):
    write_checkpoint(tmp_path, PLAIN, seed=1)
    return XGLMForCausalLM.from_pretrained(tmp_path).train()


@pytest.fixture
def small_chunks(chunk_of):
    chunk_of(3)


def trained(model, call=None, labels=LABELS):
    """The loss, and the gradients by name."""
    model.zero_grad()
    loss = (model if call is None else call)(IDS, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours, expected, atol=1e-6):
    assert ours[0] == pytest.approx(expected[0], rel=LOSS)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=0, atol=atol, msg=name)


def test_no_array_has_all_logits(model, monkeypatch, small_chunks):
    inside, outside, become_gradients = [], [], chunked_loss._become_gradients

    def noting(logits, *args):
        inside.append(logits.shape)
        return become_gradients(logits, *args)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple | list) else [result]
            outside.extend(tensor.shape for tensor in results if isinstance(tensor, torch.Tensor))
            return result

    monkeypatch.setattr(chunked_loss, "_become_gradients", noting)
    with Sizes():
        trained(model)
    assert sum(rows for rows, _ in inside) == (LABELS[:, 1:] != -100).sum()
    assert max(inside) == (3, 131)
    assert {shape for shape in outside if 131 in shape} == {(131, 35)}


def test_a_compiled_step(model):
    torch.compiler.reset()
    model.loss_options = OPTIONS
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(trained(model, compiled), trained(model))


class TestAgain:
    """A graph that is retained is gone through once more."""

    def test_gradients_add_up(self, model):
        _, expected = trained(model)
        model.zero_grad()
        loss = model(IDS, labels=LABELS, use_cache=False).loss
        (2 * loss).backward(retain_graph=True)
        loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, 3 * expected[name], rtol=0, atol=1e-5, msg=name)

    def test_only_something(self, model):
        loss = model(IDS, labels=LABELS, use_cache=False).loss
        bias = model.model.layer_norm.bias
        (first,) = torch.autograd.grad(loss, bias, retain_graph=True)
        (second,) = torch.autograd.grad(3 * loss, bias, retain_graph=True)
        torch.testing.assert_close(second, 3 * first)

    def test_changed_weights_are_noticed(self, model):
        loss = model(IDS, labels=LABELS, use_cache=False).loss
        loss.backward(retain_graph=True)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_second_derivatives_are_refused(self, model):
        loss = model(IDS, labels=LABELS, use_cache=False).loss
        with pytest.raises(InputError, match="create_graph"):
            torch.autograd.grad(loss, model.model.layer_norm.bias, create_graph=True)


class TestTiedMatrix:
    def test_other_results_than_the_loss(self, model):
        states = model(IDS, labels=LABELS, output_hidden_states=True, use_cache=False).hidden_states
        states[0].sum().backward()
        gradient = model.lm_head.weight.grad
        assert gradient.layout is torch.strided
        counts = torch.bincount(IDS.flatten(), minlength=131)[:, None] * 35**0.5
        torch.testing.assert_close(gradient, counts.expand(131, 35))

    def test_accumulation(self, model):
        expected = trained(model)[1]["model.embed_tokens.weight"]
        model(IDS, labels=LABELS, use_cache=False).loss.backward()
        torch.testing.assert_close(model.lm_head.weight.grad, 2 * expected)

    @pytest.mark.parametrize("frozen", ["model.embed_tokens", "model.layers"])
    def test_frozen(self, model, frozen):
        _, expected = trained(model)
        model.zero_grad()
        model.get_submodule(frozen).requires_grad_(False)
        model(IDS, labels=LABELS, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith(frozen):
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name], msg=name)

    def test_bad_ids(self, model):
        with pytest.raises(InputError, match=r"input_ids\[0, 1\] is 131, expected 0 to 130"):
            model(torch.tensor([[1, 131]]), labels=torch.tensor([[1, 2]]))


class TestHeads:
    """Heads that have to be called give what a plain one gives."""

    @pytest.mark.parametrize("options", [LossOptions(), OPTIONS])
    def test_a_hooked_one(self, model, small_chunks, options):
        model.loss_options = options
        expected = trained(model)
        widths = []
        model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
        assert_same(trained(model), expected)
        assert set(widths) == {1}  # A quarter of the chunk, rounded down.

    def test_compiled_heads(self, model, small_chunks):
        expected = trained(model)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + 0)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same(trained(model, compiled), expected)

    def test_an_adapted_one(self, model):
        class Adapted(nn.Linear):
            def forward(self, states):
                return super().forward(states) + self.more(states)

        adapted = Adapted(35, 131, bias=False)
        adapted.weight, adapted.more = model.lm_head.weight, nn.Linear(35, 131)
        model.lm_head = adapted
        logits = model(IDS).logits[:, :-1].flatten(0, 1).float()
        expected = nn.functional.cross_entropy(logits, LABELS[:, 1:].flatten())
        gradients = torch.autograd.grad(expected, list(adapted.more.parameters()))
        loss = model(IDS, labels=LABELS, use_cache=False).loss
        assert loss.item() == pytest.approx(expected.item(), rel=LOSS)
        loss.backward()
        for parameter, gradient in zip(adapted.more.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6)


class TestTransforms:
    """Those of `torch.func`, with the parameters as an argument."""

    @pytest.fixture
    def function(self, model):
        """The loss of parameters, ids and labels; and the parameters."""

        def loss(parameters, ids, labels):
            options = {"labels": labels, "use_cache": False}
            return torch.func.functional_call(model, parameters, (ids,), options).loss

        return loss, {name: parameter.detach() for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("options", [LossOptions(), OPTIONS])
    def test_gradient_and_value(self, model, function, options):
        model.loss_options = options
        loss, parameters = function
        gradients, value = torch.func.grad_and_value(loss)(parameters, IDS, LABELS)
        assert_same((value.item(), gradients), trained(model))

    def test_a_hooked_head(self, model, function):
        expected = trained(model)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + 0)
        loss, parameters = function
        gradients, value = torch.func.grad_and_value(loss)(parameters, IDS, LABELS)
        assert_same((value.item(), gradients), expected)

    def test_gradients_of_each_example(self, function):
        """The rows have different numbers of labels."""
        loss, parameters = function
        assert len(set((LABELS[:, 1:] != -100).sum(dim=1).tolist())) == 2

        def of_row(parameters, ids, labels):
            return loss(parameters, ids[None], labels[None])

        gradients, values = torch.func.vmap(torch.func.grad_and_value(of_row), (None, 0, 0))(parameters, IDS, LABELS)
        leaves = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
        for row in range(2):
            value = of_row(leaves, IDS[row], LABELS[row])
            one = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
            assert_same((values[row].item(), {n: g[row] for n, g in gradients.items()}), (value.item(), one))

    def test_directional_derivative(self, model, function):
        _, gradients = trained(model)
        loss, parameters = function
        directions = {name: torch.sin(torch.arange(p.numel())).view_as(p) for name, p in parameters.items()}
        value, slope = torch.func.jvp(lambda p: loss(p, IDS, LABELS), (parameters,), (directions,))
        assert value.item() == pytest.approx(loss(parameters, IDS, LABELS).item(), rel=LOSS)
        expected = sum((gradients[name] * direction).sum().item() for name, direction in directions.items())
        assert slope.item() == pytest.approx(expected, rel=1e-4)  # A sum of 50,000 products of both signs.

    def test_second_derivatives(self, model, function):
        """The derivative of gradients, against their difference."""
        loss, parameters = function
        name = "model.layer_norm.weight"
        direction = torch.sin(torch.arange(35.0))

        def gradient(scale):
            return torch.func.grad(lambda s: loss({**parameters, name: s}, IDS, LABELS))(scale)

        _, slope = torch.func.jvp(gradient, (parameters[name],), (direction,))
        near = [gradient(parameters[name] + step * direction) for step in (1e-2, -1e-2)]
        assert slope.abs().max() > 0.01
        torch.testing.assert_close(slope, (near[0] - near[1]) / 2e-2, rtol=0, atol=0.01 * slope.abs().max().item())


def test_weights_of_labels(model):
    weights = np.random.RandomState(3).random_sample((2, 11)).astype(np.float32)
    expected_loss, expected = loss_and_gradients(
        PLAIN, random_weights(PLAIN, 1).__getitem__, models.IDS, LABELS.numpy(), weights=weights
    )
    states = model.model(IDS).last_hidden_state
    output = causal_lm_loss(states, model.lm_head, LABELS, options=LossOptions(), weights=torch.from_numpy(weights))
    assert output.loss.item() == pytest.approx(expected_loss, rel=LOSS)
    output.loss.backward()
    assert_gradients_equal({n: p.grad.numpy() for n, p in model.named_parameters()}, expected)
    counted = weights[:, 1:][LABELS[:, 1:] != -100]
    assert output.count.item() == pytest.approx(counted.sum(), rel=1e-6)
    assert (output.surprisal / output.count).item() == pytest.approx(expected_loss, rel=LOSS)
    right = (model.lm_head(states).argmax(-1)[:, :-1] == LABELS[:, 1:]).numpy()
    assert output.correct.item() == pytest.approx((weights[:, 1:] * right).sum(), rel=1e-6)


class TestTypes:
    @pytest.mark.parametrize("positions", [7, 100])
    def test_bfloat16_is_summed_in_float32(self, chunk_of, positions):
        chunk_of(positions)
        torch.manual_seed(0)
        states, head = torch.randn(3, 50, 35).bfloat16().requires_grad_(), nn.Linear(35, 131, bias=False).bfloat16()
        labels = torch.randint(0, 131, (3, 50))
        causal_lm_loss(states, head, labels, options=OPTIONS).loss.backward()
        loss = causal_lm_loss(states, head, labels, options=LossOptions()).loss
        exact, matrix = (tensor.detach().double().requires_grad_() for tensor in (states, head.weight))
        logits = (exact @ matrix.T)[:, :-1].flatten(0, 1)
        wanted = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        assert loss.item() == pytest.approx(wanted.item(), rel=LOSS)
        smooth = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)
        (smooth + 0.01 * logits.logsumexp(1).square().mean()).backward()
        for ours, expected in ((states.grad, exact.grad), (head.weight.grad, matrix.grad)):
            # Rounded once, at the end, to 8 bits.
            torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=1e-9)

    def test_autocast(self, model):
        expected = trained(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = trained(model)
        assert loss == pytest.approx(expected[0], rel=0.01)
        for name, gradient in gradients.items():
            scale = expected[1][name.replace("k_proj.bias", "k_proj.weight")].abs().max()
            assert (gradient - expected[1][name]).abs().max() < 0.1 * scale, name

    def test_float16(self, model):
        half = copy.deepcopy(model).half()
        with pytest.raises(InputError, match="the trainable parameters are float16"):
            half(IDS, labels=IDS)
        half.requires_grad_(False)
        half.model.layer_norm.float().requires_grad_()  # As an adapter in float32 on a frozen model.
        half.model.layer_norm.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        half(IDS, labels=IDS).loss.backward()
        assert half.model.layer_norm.weight.grad.abs().max() > 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
class TestProducts:
    @pytest.fixture(autouse=True)
    def onednn(self, monkeypatch):
        monkeypatch.setattr(products, "takes_onednn", lambda rows, elements: True)

    @pytest.mark.parametrize("checkpointing", [None, False, True])
    def test_every_product_is_redirected(self, model, monkeypatch, checkpointing):
        monkeypatch.setattr(products, "takes_onednn", lambda rows, elements: False)
        expected = trained(model)
        monkeypatch.setattr(products, "takes_onednn", lambda rows, elements: True)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        names = []

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        with Names():
            ours = trained(model)
        assert_same(ours, expected)
        assert not {"aten.addmm.default", "aten.mm.default", "aten.addmm_.default"} & set(names)
        # Six layers in each of three blocks, forth, back twice, and forth again; and what the head needs.
        assert names.count("mkldnn._linear_pointwise.default") >= 18 * (3 if checkpointing is None else 4)

    def test_no_label_counts(self, model):
        loss, gradients = trained(model, labels=torch.full_like(LABELS, -100))
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients.values())

    def test_a_head_that_is_called(self, model):
        """Its products are computed again in the backward pass, in the same way."""
        expected = trained(model)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + 0)
        assert_same(trained(model), expected)

    def test_second_derivatives(self):
        torch.manual_seed(0)
        states, weight, bias = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7)
        results = []
        for product in (nn.functional.linear, products.linear):
            inputs = [t.clone().requires_grad_() for t in (states, weight, bias)]
            value = product(*inputs).pow(3).sum()
            first = torch.autograd.grad(value, inputs, create_graph=True)
            results.append([*first, *torch.autograd.grad(sum(g.sum() for g in first), inputs)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_autocast_and_transforms_stay_as_they_are(self):
        weight, states = torch.randn(7, 5), torch.randn(3, 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert products.linear(states, weight).dtype is torch.bfloat16
        gradient = torch.func.grad(lambda weight: products.linear(states, weight).sum())(weight)
        torch.testing.assert_close(gradient, states.sum(0).expand(7, 5))

    def test_compiled_products(self, model):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same(trained(model, compiled), trained(model))
