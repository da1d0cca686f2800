"""XGLM in JAX and Flax Linen."""

from xglm_core.backends import require_frameworks

require_frameworks("flax")

from xglm_flax.causal_lm import FlaxXGLMForCausalLM, FlaxXGLMForCausalLMModule  # noqa: E402
from xglm_flax.decoder import FlaxXGLMModel, FlaxXGLMModule  # noqa: E402
from xglm_flax.stacking import stack_layers, unstack_layers  # noqa: E402

__all__ = [
    "FlaxXGLMForCausalLM",
    "FlaxXGLMForCausalLMModule",
    "FlaxXGLMModel",
    "FlaxXGLMModule",
    "stack_layers",
    "unstack_layers",
]
