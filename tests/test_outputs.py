import copy
import dataclasses
import pickle

import numpy as np
import pytest

from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions

LOGITS, STATES = np.zeros((2, 3)), (np.ones(2), np.ones(3))


@pytest.fixture
def output():
    return CausalLMOutputWithCrossAttentions(hidden_states=STATES, logits=LOGITS)


def test_documented_fields_in_their_order():
    tail = ["past_key_values", "hidden_states", "attentions", "cross_attentions"]
    fields = {kind: [f.name for f in dataclasses.fields(kind)] for kind in _KINDS}
    assert fields[BaseModelOutputWithPastAndCrossAttentions] == ["last_hidden_state", *tail]
    assert fields[CausalLMOutputWithCrossAttentions] == ["loss", "logits", *tail]


_KINDS = (BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions)


@pytest.mark.parametrize("kind", _KINDS)
def test_all_absent_by_default(kind):
    assert kind().keys() == kind().to_tuple() == ()
    assert len(kind()) == 0


def test_attributes(output):
    assert output.logits is LOGITS
    assert output.hidden_states is STATES
    assert output.loss is None


def test_tuple_of_what_is_there(output):
    assert output.to_tuple()[0] is output[0] is LOGITS
    assert output[1] is output[-1] is STATES
    assert output[:1] == (LOGITS,)
    assert len(output) == 2
    logits, states = output
    assert logits is LOGITS
    assert states is STATES
    with pytest.raises(IndexError):
        output[2]


def test_mapping_of_what_is_there(output):
    assert output.keys() == ("logits", "hidden_states")
    assert output["logits"] is LOGITS
    assert dict(output) == {"logits": LOGITS, "hidden_states": STATES}
    assert {**output}["hidden_states"] is STATES


@pytest.mark.parametrize("key", ["loss", "unknown", "to_tuple", "_values"])
def test_absent_keys(output, key):
    assert key not in output
    with pytest.raises(KeyError, match=key):
        output[key]


def test_membership_is_that_of_a_mapping(output):
    """Comparing with the arrays instead would raise, or compare element by element."""
    assert "logits" in output
    assert "hidden_states" in output
    assert 0 not in output


def test_frozen(output):
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.logits = None


def test_comparison_is_by_identity(output):
    assert output == output
    assert output != dataclasses.replace(output)
    assert len({output, output}) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_copies(output, copied):
    again = copied(output)
    assert type(again) is type(output)
    assert again.keys() == output.keys()
    np.testing.assert_array_equal(again.logits, LOGITS)
