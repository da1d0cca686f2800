"""What generation does for a further token: no check, few calls of ours, and the modules' own calls."""

import collections

import pytest
import torch

from tests.helpers import models
from tests.helpers.models import CONFIG
from tests.helpers.walk import calls
from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_torch import XGLMForCausalLM

IDS, MASK = torch.from_numpy(models.IDS), torch.from_numpy(models.LEFT)


@pytest.fixture(scope="module")
def model(folder):
    return XGLMForCausalLM.from_pretrained(folder)


def walk(model, ids, count):
    """The calls for so many new tokens."""
    return calls(lambda: model.generate(ids, max_new_tokens=count, stop_at_eos=False))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_further_token_is_a_short_walk(model, rows):
    walk(model, IDS[:rows], 3)
    before, after = walk(model, IDS[:rows], 3), walk(model, IDS[:rows], 11)
    more = after - before
    assert not [name for _, name in more if "check" in name]
    assert len({file for file, _ in more}) <= 12
    # Of three blocks: about 15 in each, and twice as many around them; of several rows also the choice of 19 products.
    assert more.total() / 8 < (90 if rows == 1 else 270)


def test_hooks_see_each_step(model):
    seen = collections.Counter()
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.update([name]))
        for name, module in (("whole", model), ("decoder", model.model), ("block", model.model.layers[1]))
    ]
    logits = []
    handles.append(model.register_forward_hook(lambda module, args, output: logits.append(output.logits)))
    model.generate(IDS, MASK, max_new_tokens=4, stop_at_eos=False)
    for handle in handles:
        handle.remove()
    assert seen == {"whole": 4, "decoder": 4, "block": 4}
    assert {tuple(each.shape) for each in logits} == {(2, 1, CONFIG.vocab_size)}


def test_a_subclass_with_a_call_of_its_own_is_asked(folder):
    class Doubled(XGLMForCausalLM):
        def forward(self, input_ids=None, **arguments):
            outputs = super().forward(input_ids, **arguments)
            return CausalLMOutputWithCrossAttentions(**{**outputs, "logits": 2 * outputs.logits})

    options = {"max_new_tokens": 3, "stop_at_eos": False, "return_dict_in_generate": True, "output_logits": True}
    found = Doubled.from_pretrained(folder).generate(IDS, MASK, **options).logits
    expected = XGLMForCausalLM.from_pretrained(folder).generate(IDS, MASK, **options).logits
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, 2 * other, **models.SAME)


def test_the_public_call_and_the_inner_one_agree(model):
    """Also with a past."""
    with torch.no_grad():
        public = model.model(IDS, MASK, use_cache=True, output_hidden_states=True)
        inner = model.model(DecoderInputs(IDS, MASK), None, Wanted(cache=True, hidden_states=True))
        assert torch.equal(public.last_hidden_state, inner.last_hidden_state)
        assert len(public.hidden_states) == len(inner.hidden_states) == CONFIG.num_layers + 1
        assert inner.attentions is None
        step = IDS[:, :1]
        again = model.model(DecoderInputs(step), inner.past_key_values, Wanted()).last_hidden_state
        expected = model.model(step, past_key_values=public.past_key_values).last_hidden_state
        assert torch.equal(again, expected)
