"""The small model and the inputs of the tests that run once per backend."""

import numpy as np
import pytest

from xglm_core import XGLMConfig

# Pairwise different primes where the architecture allows it: a swapped axis cannot pass.
CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=35, ffn_dim=53, num_layers=3, attention_heads=5)
IDS = np.random.RandomState(0).randint(4, CONFIG.vocab_size, (2, 11))
LEFT = np.array([[0, 0, 0] + [1] * 8, [1] * 11])
RIGHT = LEFT[:, ::-1].copy()

# Two orders of the same float32 sums differ by rounding alone: a few units in the last place per layer.
SAME = {"rtol": 0, "atol": 1e-5}

CROSS_CONFIG = XGLMConfig.from_dict({**CONFIG.to_dict(), "add_cross_attention": True})
ENCODER = np.random.RandomState(1).standard_normal((2, 7, 35)).astype(np.float32)
ENCODER_MASK = np.array([[1] * 7, [1] * 5 + [0] * 2])
HEAD_MASK = np.array([[1, 0, 1, 0.5, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.float32)


def core_decides(fw: object) -> None:
    """Skips a test where compiling takes most of the time and the backend has no part in what it shows."""
    if fw.name != "torch":
        pytest.skip("the core decides; PyTorch shows it")


def changed(config: XGLMConfig, **values: object) -> XGLMConfig:
    """The configuration with other values."""
    return XGLMConfig.from_dict({**config.to_dict(), **values})


# Where the number of blocks is without effect: what is compiled takes half the time.
ONE_BLOCK = changed(CONFIG, num_layers=1)
