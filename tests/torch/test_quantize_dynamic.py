"""PyTorch's own dynamic quantization finds the linear layers, fast ones too."""

import pytest
import torch
from torch import nn

from tests.helpers import models
from xglm_torch import XGLMForCausalLM, XGLMModel

IDS = torch.from_numpy(models.IDS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", [XGLMForCausalLM, XGLMModel])
def test_quantize_dynamic(kind, folder):
    model = kind.from_pretrained(folder)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert all("quantized" in type(quantized.get_submodule(name)).__module__ for name in layers)
    with torch.no_grad():
        found, expected = quantized(IDS)[0], model(IDS)[0]
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()  # Of 8 bits, through three blocks.
    if kind is XGLMForCausalLM:
        assert quantized.generate(IDS, max_new_tokens=2, stop_at_eos=False).shape == (2, 13)
        assert torch.isfinite(quantized.score(IDS)).all()
