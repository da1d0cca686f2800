"""What `generate` returns, and caches that were made in inference mode, can enter autograd."""

import numpy as np
import pytest
import torch

from tests.helpers.frameworks import Framework
from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, IDS, LEFT

FW = Framework("torch")
ARGUMENTS = {"max_new_tokens": 3, "stop_at_eos": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return FW.fresh(CONFIG)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 0, "seed": 1}], ids=str)
def test_scores_and_logits(model, options):
    output = model.generate(FW.tensor(IDS), output_scores=True, output_logits=True, **ARGUMENTS, **options)
    for tensor in (*output.scores, *output.logits):
        assert not tensor.is_inference()
        weight = torch.ones(CONFIG.vocab_size, requires_grad=True)
        (weight * tensor).sum().backward()
        assert torch.equal(weight.grad, tensor.sum(dim=0))


def test_a_cache_of_generate(model):
    output = model.generate(FW.tensor(IDS), attention_mask=FW.tensor(LEFT), **ARGUMENTS)
    mask = torch.cat([FW.tensor(LEFT), torch.ones(2, 3, dtype=torch.long)], dim=1)
    model.zero_grad()
    model(output.sequences[:, -1:], mask, past_key_values=output.past_key_values).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_a_hook_may_use_gradients(model):
    def uphill(ids, logits):
        with torch.enable_grad():
            copy = logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(copy.softmax(-1)[:, 7].log().sum(), copy)
        return logits + 1000 * gradient

    assert (model.generate(FW.tensor(IDS), logits_processor=[uphill], max_new_tokens=2)[:, 11:] == 7).all()


@pytest.mark.parametrize("config", [CONFIG, CROSS_CONFIG], ids=["decoder", "cross-attention"])
def test_of_inference_mode_goes_on_outside_it(config):
    model, ids, mask = FW.fresh(config), FW.tensor(IDS), FW.tensor(LEFT)
    encoder = {"encoder_hidden_states": FW.tensor(ENCODER)} if config.add_cross_attention else {}
    with torch.inference_mode():
        cache = model(ids[:, :6], mask[:, :6], use_cache=True, **encoder).past_key_values
    expected = model(ids, mask, **encoder).logits[:, 6:]
    for _ in range(2):
        got = model(ids[:, 6:], mask, past_key_values=cache).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        model.zero_grad()
        got.sum().backward()
        assert model.model.layers[0].fc1.weight.grad.abs().max() > 0
    with torch.no_grad():
        step = model(ids[:, 6:7], mask[:, :7], past_key_values=cache)
        torch.testing.assert_close(step.logits, expected[:, :1], rtol=0, atol=1e-5)
    if not config.add_cross_attention:
        options = {"max_new_tokens": 2, "stop_at_eos": False}
        got = model.generate(ids, mask, past_key_values=cache, **options)
        assert np.array_equal(got.numpy(), model.generate(ids, mask, **options).numpy())
