"""What only the PyTorch backend promises."""

import copy

import numpy as np
import pytest

from tests.frameworks import backends_under_test

if "torch" not in backends_under_test():
    pytest.skip("XGLM_TEST_BACKENDS leaves torch out", allow_module_level=True)

import torch

from conformance.random_weights import write_checkpoint
from xglm_core import XGLMConfig, open_checkpoint
from xglm_core.weight_names import EMBEDDING, weight_specs
from xglm_torch import XGLMForCausalLM

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=35, ffn_dim=53, num_layers=3, attention_heads=5)
IDS = torch.from_numpy(np.random.RandomState(0).randint(4, CONFIG.vocab_size, (2, 11)))
MASK = torch.tensor([[0, 0, 0] + [1] * 8, [1] * 11])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, CONFIG, seed=1)
    return path


@pytest.fixture
def model(folder):
    return XGLMForCausalLM.from_pretrained(folder)


def test_parameters_have_the_published_names_and_shapes(model):
    published = {spec.name: spec.shape for spec in weight_specs(CONFIG, with_head=True)}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == published
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parameters_are_copy_on_write_views_of_the_file(model, folder):
    before = open_checkpoint(folder).read(EMBEDDING).copy()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert np.array_equal(open_checkpoint(folder).read(EMBEDDING), before)


def test_position_table_survives_meta_emptying_and_casting(model, folder):
    expected = model.model.embed_positions.weights.clone()
    with torch.device("meta"):
        emptied = XGLMForCausalLM(CONFIG)
    emptied = emptied.to_empty(device="cpu")
    emptied.load_state_dict(model.state_dict(), assign=True)
    for other in (emptied, copy.deepcopy(model).half(), model.to("meta").to_empty(device="cpu")):
        table = other.model.embed_positions.weights
        assert table.dtype == torch.float32
        assert torch.equal(table, expected)


def test_assigning_a_state_dict_unties_and_tie_weights_mends_it(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dropout_acts_in_training_only(folder):
    values = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    for name in values:
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), **values, name: 0.5})
        model = XGLMForCausalLM(config)
        assert not torch.equal(model.train()(IDS).logits, model(IDS).logits), name
        assert torch.equal(model.eval()(IDS).logits, model(IDS).logits), name


def test_gradients_flow_with_and_without_a_cache(model):
    model(IDS, MASK, use_cache=False).logits.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(IDS, MASK, use_cache=True).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("mask", [None, MASK])
def test_one_graph(model, mask):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # The same operations in the same order: nothing may differ.
    assert torch.equal(compiled(IDS, mask, use_cache=False).logits, model(IDS, mask, use_cache=False).logits)


def test_inputs_are_left_alone(model):
    ids, mask, positions = IDS.clone(), MASK.clone(), torch.arange(11).repeat(2, 1)
    past = model(ids, mask, positions).past_key_values
    model(ids[:, :1], past_key_values=past)
    assert torch.equal(ids, IDS)
    assert torch.equal(mask, MASK)
    assert torch.equal(positions, torch.arange(11).repeat(2, 1))
    assert past.length == 11
