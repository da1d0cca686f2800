import copy
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
    assert BaseModelOutputWithPastAndCrossAttentions.names == ("last_hidden_state", *tail)
    assert CausalLMOutputWithCrossAttentions.names == ("loss", "logits", *tail)


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


@pytest.mark.parametrize("key", ["loss", "unknown", "to_tuple", "names"])
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
    with pytest.raises(AttributeError):
        output.logits = None


def test_unknown_names(output):
    with pytest.raises(AttributeError, match="no attribute 'logit'; its fields are loss, logits, "):
        output.logit  # noqa: B018
    with pytest.raises(TypeError, match="has no field 'logit'; expected some of"):
        CausalLMOutputWithCrossAttentions(logit=1)


def test_is_the_named_tuple_that_frameworks_know(output):
    assert isinstance(output, tuple)
    assert output._fields == ("logits", "hidden_states")
    again = output._make([1, 2])
    assert type(again) is type(output)
    assert (again.logits, again.hidden_states, again.loss) == (1, 2, None)
    assert type(output)(*output).logits is LOGITS


def test_comparison_is_by_identity(output):
    assert output == output
    assert output != copy.copy(output)
    assert len({output, output}) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_copies(output, copied):
    again = copied(output)
    assert type(again) is type(output)
    assert again.keys() == output.keys()
    np.testing.assert_array_equal(again.logits, LOGITS)
