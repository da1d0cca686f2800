"""The examples of the API that users have code against run here with other imports and a folder for the hub name."""

import numpy as np
import pytest

from tests.helpers.commands import ROOT

CHECKPOINT = str(ROOT / "examples" / "tiny_model" / "checkpoint")

IMPORTS = """
from xglm_core import XGLMTokenizer as AutoTokenizer
from {package} import {model}
"""

LOAD = """
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = {model}.from_pretrained(CHECKPOINT)
"""

# By backend and class: the call, and what it is made for.
CALLS = {
    ("torch", "decoder"): """
inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
outputs = model(**inputs)
result = outputs.last_hidden_state
""",
    ("torch", "causal_lm"): """
inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
outputs = model(**inputs, labels=inputs["input_ids"])
loss = outputs.loss
result = outputs.logits
""",
    ("tf", "decoder"): """
inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")
outputs = model(inputs)
result = outputs.last_hidden_state
""",
    ("tf", "causal_lm"): """
inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")
outputs = model(inputs)
result = outputs.logits
""",
    ("flax", "decoder"): """
inputs = tokenizer("Hello, my dog is cute", return_tensors="jax")
outputs = model(**inputs)
result = outputs.last_hidden_state
""",
    ("flax", "causal_lm"): """
inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
outputs = model(**inputs)
result = outputs.logits[:, -1]
""",
}


@pytest.mark.parametrize("kind", ["decoder", "causal_lm"])
def test_models(fw, kind):
    names = {"package": fw.package.__name__, "model": getattr(fw, kind).__name__}
    scope = {"CHECKPOINT": CHECKPOINT}
    exec((IMPORTS + LOAD).format(**names) + CALLS[fw.name, kind], scope)
    ids, width = np.asarray(scope["inputs"]["input_ids"]), scope["model"].config.d_model
    assert ids.shape[0] == 1
    assert ids.shape[1] > 5
    result = fw.numpy(scope["result"])
    vocabulary = scope["model"].config.vocab_size
    last = (1, vocabulary) if fw.name == "flax" else (*ids.shape, vocabulary)
    assert result.shape == ((*ids.shape, width) if kind == "decoder" else last)
    assert np.isfinite(result).all()
    if "loss" in scope:
        assert 0 < float(scope["loss"].detach()) < 12


def test_configuration(fw):
    scope = {}
    source = f"""
from xglm_core import XGLMConfig
from {fw.package.__name__} import {fw.decoder.__name__} as XGLMModel

configuration = XGLMConfig()
small = XGLMConfig(vocab_size=131, num_layers=2, d_model=36, ffn_dim=53, attention_heads=4)
model = XGLMModel(small)  # The documented one, configuration, takes 2.3 GB.
configuration = model.config
"""
    exec(source, scope)
    assert scope["configuration"] is scope["small"]
