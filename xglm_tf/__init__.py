"""XGLM in TensorFlow, on Keras 3."""

from xglm_core.backends import require_frameworks
from xglm_core.errors import BackendError

require_frameworks("tf")

import keras  # noqa: E402

# Differs: no check of this kind in PyTorch and Flax. Keras runs on one of several frameworks, chosen when it is first
# imported.
if keras.config.backend() != "tensorflow":
    raise BackendError(
        f"xglm_tf needs Keras on TensorFlow, but Keras runs on {keras.config.backend()}; "
        "set the environment variable KERAS_BACKEND=tensorflow before Keras is imported"
    )

from xglm_tf.causal_lm import TFXGLMForCausalLM  # noqa: E402
from xglm_tf.decoder import TFXGLMModel  # noqa: E402

__all__ = ["TFXGLMForCausalLM", "TFXGLMModel"]
