"""A checkpoint with matrices of int8 in every backend: PyTorch keeps them, TensorFlow and JAX make floats of them."""

import json
import warnings

import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, IDS, LEFT, ONE_BLOCK
from xglm_core import XGLMConfig, convert_checkpoint, open_checkpoint
from xglm_core.errors import InputError
from xglm_core.weight_names import EMBEDDING


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    write_checkpoint(folder / "before", ONE_BLOCK, seed=1)
    convert_checkpoint(folder / "before", folder / "int8", to="safetensors", dtype="int8")
    convert_checkpoint(folder / "int8", folder / "floats", to="safetensors", dtype="float32")
    return folder


def test_it_computes_what_its_floats_do(fw, folder, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = fw.causal_lm.from_pretrained(folder / "int8")
    costs = [str(warning.message) for warning in said if "int8" in str(warning.message)]
    assert len(costs) == (fw.name != "torch")
    floats = fw.causal_lm.from_pretrained(folder / "floats")
    found, expected = (fw.logits(each, IDS, LEFT)[LEFT == 1] for each in (model, floats))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    # What is saved is what the model holds.
    model.save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path).info(EMBEDDING).dtype.name
    assert stored == ("int8" if fw.name == "torch" else "float32")
    assert ("quantization_config" in json.loads((tmp_path / "config.json").read_text())) == (fw.name == "torch")
    assert XGLMConfig.from_pretrained(tmp_path).num_layers == CONFIG.num_layers - 2


def test_quantization_is_of_pytorch(fw, folder):
    if fw.name == "torch":
        pytest.skip("see tests/torch/test_int8.py")
    with pytest.raises(InputError, match="quantization is not offered here; PyTorch computes with int8"):
        fw.causal_lm.from_pretrained(folder / "before", quantization="int8")
