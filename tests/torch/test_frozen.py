"""A model that is frozen for inference computes, saves and trains as before."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from tests.torch.test_scoring import Operations
from xglm_core.compare import oracle
from xglm_torch import XGLMForCausalLM, XGLMModel
from xglm_torch.fast.frozen import JoinedLinear

CERTAIN = changed(CONFIG, dropout=0.0, attention_dropout=0.0)
READ = random_weights(CERTAIN, seed=1).__getitem__
TOKENS, MASK = torch.from_numpy(IDS), torch.from_numpy(LEFT)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    write_checkpoint(folder, CERTAIN, seed=1)
    return folder


@pytest.fixture
def frozen(checkpoint):
    return XGLMForCausalLM.from_pretrained(checkpoint, inference=True)


@pytest.fixture
def plain(checkpoint):
    return XGLMForCausalLM.from_pretrained(checkpoint)


@torch.no_grad()
def logits(model):
    return model(TOKENS, MASK).logits.numpy()[LEFT != 0]


def test_logits_scores_and_texts(frozen, plain):
    expected = oracle.forward(CERTAIN, READ, IDS, LEFT).logits
    np.testing.assert_allclose(logits(frozen), expected[LEFT != 0], **SAME)
    np.testing.assert_allclose(frozen.score(TOKENS, MASK), plain.score(TOKENS, MASK), **SAME)
    options = {"max_new_tokens": 5, "stop_at_eos": False}
    assert torch.equal(frozen.generate(TOKENS, MASK, **options), plain.generate(TOKENS, MASK, **options))


@torch.no_grad()
def test_one_product_for_queries_keys_and_values(frozen, plain):
    def products(model):
        with Operations() as seen:
            model(TOKENS, MASK)
        return sum(name.startswith(("aten.addmm", "aten.mm", "aten.linear", "mkldnn")) for name in seen.names)

    assert products(frozen) == products(plain) - 2 * CONFIG.num_layers


def test_gradients(frozen, plain):
    for model in (frozen, plain):
        model.train()(TOKENS, MASK, labels=TOKENS, use_cache=False).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_new_weights_act(frozen, plain, name, how):
    for model in (frozen, plain):
        layer = model.model.layers[1].self_attn.get_submodule(name)
        if how == "in place":
            layer.weight *= 2
            layer.bias += 1
        else:
            layer.weight, layer.bias = nn.Parameter(layer.weight * 2), nn.Parameter(layer.bias + 1)
    np.testing.assert_allclose(logits(frozen), logits(plain), **SAME)


def test_weights_are_saved_and_read(frozen, plain, tmp_path):
    frozen.save_pretrained(tmp_path)
    for found in (frozen, XGLMForCausalLM.from_pretrained(tmp_path)):
        for name, value in plain.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)
    other = {name: value * 1.25 for name, value in plain.state_dict().items()}
    frozen.load_state_dict(other)
    plain.load_state_dict(other)
    np.testing.assert_allclose(logits(frozen), logits(plain), **SAME)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: model.to(torch.float64).to(torch.float32),
        lambda model: model.freeze(),
        lambda model: model.resize_token_embeddings(CONFIG.vocab_size + 3) and model,
        lambda model: model.prune_heads({1: [0]}) or model,
    ],
    ids=["copied", "to another type", "frozen again", "resized", "pruned"],
)
def test_changed_afterwards(frozen, plain, change):
    torch.manual_seed(1)
    ours = logits(change(frozen))
    torch.manual_seed(1)
    np.testing.assert_allclose(ours, logits(change(plain)), **SAME)


def test_an_embedding_of_two_uses_stays_one(frozen):
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight


def test_nothing_is_held_between_calls(frozen):
    logits(frozen)
    joined = [module._joined.last for module in frozen.modules() if isinstance(module, JoinedLinear)]
    assert joined
    assert all(given is None for given, _ in joined)


def test_compiled_and_bare(checkpoint, frozen, plain):
    torch.compiler.reset()
    with torch.no_grad():
        ours = torch.compile(frozen, backend="aot_eager")(TOKENS, MASK).logits
        torch.testing.assert_close(ours, plain(TOKENS, MASK).logits)
    assert isinstance(XGLMModel.from_pretrained(checkpoint).freeze().layers[0].self_attn.q_proj, JoinedLinear)


def test_plain_forms(checkpoint, monkeypatch):
    monkeypatch.setenv("XGLM_PLAIN", "1")
    model = XGLMForCausalLM.from_pretrained(checkpoint, inference=True)
    assert not any(isinstance(module, JoinedLinear) for module in model.modules())
