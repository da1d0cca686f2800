"""What PyTorch offers around a model: retained gradients, compiled and traced calls, default types, float64."""

import copy

import numpy as np
import pytest
import torch

from tests.helpers.frameworks import Framework
from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, HEAD_MASK, IDS, LEFT, RIGHT, SAME, changed
from xglm_core.compare import oracle
from xglm_torch import XGLMForCausalLM, XGLMModel

FW = Framework("torch")
TOKENS, MASK = torch.from_numpy(IDS), torch.from_numpy(LEFT)


@pytest.fixture(scope="module")
def model():
    return FW.fresh(CONFIG)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("head_mask", [None, torch.ones(3, 5), torch.from_numpy(HEAD_MASK)], ids=["none", "1", "some"])
def test_what_is_returned_has_gradients(head_mask, train):
    torch.manual_seed(0)
    config = changed(CROSS_CONFIG, attention_dropout=0.1)
    outputs = XGLMModel(config).train(train)(
        TOKENS,
        encoder_hidden_states=torch.from_numpy(ENCODER),
        head_mask=head_mask,
        cross_attn_head_mask=head_mask,
        output_attentions=True,
        output_hidden_states=True,
    )
    returned = (*outputs.hidden_states, *outputs.attentions, *outputs.cross_attentions)
    for tensor in returned:
        tensor.retain_grad()
    outputs.last_hidden_state[0, -1, 0].backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in returned)


def answers(model):
    """Of each way to use a model."""
    loss = model(TOKENS, MASK, labels=TOKENS).loss
    start = model(TOKENS[:, :6], MASK[:, :6])
    return {
        "logits": model(TOKENS, MASK).logits.detach()[MASK != 0],
        "loss": loss.detach(),
        "gradient": torch.autograd.grad(loss, model.lm_head.weight)[0],
        "cached": model(TOKENS[:, 6:], MASK, past_key_values=start.past_key_values).logits.detach(),
        "score": model.score(TOKENS, MASK),
        "generate": model.generate(TOKENS, attention_mask=MASK, max_new_tokens=3),
        "sample": model.generate(TOKENS, attention_mask=MASK, max_new_tokens=3, do_sample=True, seed=1),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_type(model, dtype):
    expected = answers(model)
    torch.set_default_dtype(dtype)
    try:
        found = answers(model)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("way", ["compile", "forward", "layers"])
def test_compiled_forward(way):
    """In one graph, also inside `generate` and `score`."""
    torch.compiler.reset()
    model = FW.fresh(changed(CONFIG, num_layers=1))
    expected = answers(copy.deepcopy(model))
    options = {"backend": "eager", "fullgraph": True}
    if way == "compile":
        model.compile(**options)
    elif way == "forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        for layer in model.model.layers:
            layer.compile(**options)
    assert torch.equal(model.generate(TOKENS, attention_mask=MASK, max_new_tokens=3), expected["generate"])
    np.testing.assert_allclose(model.score(TOKENS, MASK), expected["score"], **SAME)
    loss = model(TOKENS, MASK, labels=TOKENS).loss
    np.testing.assert_allclose(loss.detach(), expected["loss"], **SAME)
    np.testing.assert_allclose(torch.autograd.grad(loss, model.lm_head.weight)[0], expected["gradient"], **SAME)


class Logits(torch.nn.Module):
    """What a trace can hold: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return self.model(*arguments).logits


OTHER = torch.from_numpy(np.random.RandomState(3).randint(4, CONFIG.vocab_size, (3, 17)))


@pytest.mark.parametrize("use_cache", [False, True], ids=["", "cache"])
def test_export_of_any_batch_and_length_without_a_mask(model, use_cache):
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=CONFIG.max_position_embeddings)}
    arguments = {"use_cache": use_cache}
    program = torch.export.export(model, (TOKENS,), arguments, dynamic_shapes={"input_ids": sizes, "use_cache": None})
    outputs, expected = program.module()(OTHER, **arguments), model(OTHER)
    np.testing.assert_allclose(outputs.logits.detach(), expected.logits.detach(), **SAME)
    if use_cache:
        after = [model(OTHER[:, :1], past_key_values=each.past_key_values).logits for each in (outputs, expected)]
        np.testing.assert_allclose(*(logits.detach() for logits in after), **SAME)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
class TestTrace:
    def test_without_a_mask(self, model):
        traced = torch.jit.trace(Logits(model), (TOKENS,))
        for ids in (TOKENS, OTHER, OTHER[:, :1]):
            np.testing.assert_allclose(traced(ids).detach(), model(ids).logits.detach(), **SAME)

    def test_a_mask_of_ones_stands_for_any_mask(self, model):
        traced = torch.jit.trace(Logits(model), (TOKENS, torch.ones_like(MASK)))
        for mask in (MASK, torch.from_numpy(RIGHT)):
            found, expected = traced(TOKENS, mask), model(TOKENS, mask).logits
            np.testing.assert_allclose(found[mask != 0].detach(), expected[mask != 0].detach(), **SAME)

    def test_of_the_model_itself(self, model):
        """With tuples: torch.jit knows of no other outputs."""
        plain = XGLMForCausalLM(changed(CONFIG, return_dict=False, use_cache=False)).eval()
        plain.load_state_dict(model.state_dict())
        traced = torch.jit.trace(plain, (TOKENS, MASK))
        np.testing.assert_allclose(traced(TOKENS, MASK)[0].detach(), model(TOKENS, MASK).logits.detach(), **SAME)


class TestFloat64:
    """Rounding is that of float64, relative to numbers of order 1."""

    @pytest.mark.parametrize("attentions", [False, True], ids=["", "attentions"])
    def test_calls(self, model, attentions):
        double = copy.deepcopy(model).double()
        weights = {name: tensor.numpy() for name, tensor in double.state_dict().items()}
        outputs = double(TOKENS, MASK, output_attentions=attentions)
        expected = oracle.forward(CONFIG, weights.__getitem__, IDS, LEFT, attentions=attentions)
        real = LEFT != 0
        np.testing.assert_allclose(outputs.logits.detach()[real], expected.logits[real], rtol=0, atol=1e-13)
        for found, wanted in zip(outputs.attentions or (), expected.attentions or (), strict=True):
            rows = found.detach().transpose(1, 2)[real], wanted.transpose(0, 2, 1, 3)[real]
            np.testing.assert_allclose(*rows, rtol=0, atol=1e-13)

    def test_everything_else(self, model):
        expected, found = answers(model), answers(copy.deepcopy(model).double())
        assert found["gradient"].dtype == torch.float64
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor, expected[name], **SAME, err_msg=name)


def test_float16_models(model):
    expected, found = answers(model), answers(copy.deepcopy(model).half())
    assert found["logits"].dtype == torch.float16
    for name in ("logits", "loss", "score"):  # Of order 1 to 5, with 11 bits.
        np.testing.assert_allclose(found[name].float(), expected[name], rtol=0, atol=0.02, err_msg=name)
