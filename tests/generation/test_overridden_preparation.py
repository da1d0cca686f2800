"""A `prepare_inputs_for_generation` that somebody replaced is not passed by in silence.

PyTorch's `generate` asks it: tests/torch/test_soft_prompts.py.
"""

import pytest

from tests.helpers.models import IDS
from xglm_core.errors import InputError


@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "update_inputs_for_generation"])
def test_compiled_generation_refuses(fw, model, monkeypatch, name):
    if fw.name == "torch" or not hasattr(model, name):
        pytest.skip("there is no such method, or it is called")
    own = getattr(model, name)
    monkeypatch.setattr(model, name, lambda *args, **options: own(*args, **options))
    message = f"{name} of this {type(model).__name__} is not that of {fw.causal_lm.__name__}, and compiled"
    with pytest.raises(InputError, match=message):
        fw.generate(model, IDS, max_new_tokens=2)
    with pytest.raises(InputError, match=message):
        model.stream(fw.tensor(IDS), max_new_tokens=2)
    monkeypatch.setattr(model, name, own)  # The same method, as peft leaves it behind.
    assert fw.generate(model, IDS, max_new_tokens=2).shape == (2, 13)
