"""XGLM in JAX and Flax Linen."""

from xglm_core.backends import require_frameworks

require_frameworks("flax")

import xglm_flax.exporting  # noqa: E402, F401, which tells `jax.export` about our types
from xglm_flax.causal_lm import FlaxXGLMForCausalLM, FlaxXGLMForCausalLMModule  # noqa: E402
from xglm_flax.decoder import FlaxXGLMModel, FlaxXGLMModule  # noqa: E402
from xglm_flax.parallel import make_mesh, partition_specs, place_batch, place_params  # noqa: E402
from xglm_flax.stacking import stack_layers, unstack_layers  # noqa: E402
from xglm_flax.training import FlaxXGLMTrainState, make_eval_step, make_loss_fn, make_train_step  # noqa: E402

__all__ = [
    "FlaxXGLMForCausalLM",
    "FlaxXGLMForCausalLMModule",
    "FlaxXGLMModel",
    "FlaxXGLMModule",
    "FlaxXGLMTrainState",
    "make_eval_step",
    "make_loss_fn",
    "make_mesh",
    "make_train_step",
    "partition_specs",
    "place_batch",
    "place_params",
    "stack_layers",
    "unstack_layers",
]
