"""XGLM in PyTorch."""

from xglm_core.backends import require_frameworks

require_frameworks("torch")

from xglm_torch.causal_lm import XGLMForCausalLM  # noqa: E402
from xglm_torch.decoder import XGLMModel  # noqa: E402

__all__ = ["XGLMForCausalLM", "XGLMModel"]
