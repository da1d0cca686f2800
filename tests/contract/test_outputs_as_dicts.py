"""Outputs are read as dictionaries, too, and say why they cannot be written."""

import numpy as np
import pytest

from tests.helpers.models import IDS
from xglm_core.outputs import CausalLMOutputWithCrossAttentions


@pytest.fixture
def outputs(fw, model):
    return fw.call(model, IDS, labels=IDS, use_cache=False)


def test_reading(outputs):
    assert list(outputs.keys()) == ["loss", "logits"]
    assert outputs.items()[1][1] is outputs.values()[1] is outputs.logits is outputs["logits"] is outputs.get("logits")
    assert dict(outputs).keys() == dict(**outputs).keys() == {"loss", "logits"}
    assert outputs.get("attentions") is None
    assert outputs.get("attentions", 3) == 3
    assert "loss" in outputs
    assert "attentions" not in outputs


def test_writing(outputs):
    message = "loss of a CausalLMOutputWithCrossAttentions cannot be assigned, as outputs are tuples; make another"
    with pytest.raises(AttributeError, match=message):
        outputs.loss = 0.0
    with pytest.raises(AttributeError, match=message):
        outputs["loss"] = 0.0
    with pytest.raises(AttributeError, match="attentions of a CausalLM"):
        outputs.attentions = ()
    another = CausalLMOutputWithCrossAttentions(**{**outputs, "loss": 0.0})
    assert another.loss == 0.0
    assert another.logits is outputs.logits


def test_in_place(fw, outputs):
    """What a tensor's own operation has changed is assigned as what it was."""
    before = float(outputs.loss)
    if fw.name != "torch":  # Tensors of the others do not change.
        with pytest.raises(AttributeError, match="cannot be assigned"):
            outputs.loss += 1
        return
    outputs.loss += 1
    outputs["loss"] += 1
    np.testing.assert_allclose(float(outputs.loss), before + 2, rtol=1e-6)
