"""The sinusoidal position table: one definition for all backends.

XGLM was trained with fairseq's `SinusoidalPositionalEmbedding`: row r holds sin(r f_i) for each frequency
f_i = 10000^(-i / (half - 1)), then cos(r f_i), with half = d_model // 2; position p reads row p + 2. Its arithmetic is
float32, and that matters: towards row 2049 a float64 table differs by up to 1.6e-4 (d_model 2048). Each step below
rounds once, correctly, to float32, so the table is the same on every machine; PyTorch's own `exp` misses the correctly
rounded frequency in about 1% of the entries by one unit in the last place (at most 6e-5 in the table).
"""

from __future__ import annotations

import math

import numpy as np

from xglm_core.config import XGLMConfig

POSITION_OFFSET = 2  # fairseq numbers positions from padding_idx + 1; with padding_idx = 1 the first row used is 2.


def position_table(config: XGLMConfig) -> np.ndarray:
    """The table [max_position_embeddings + 2, d_model], float32.

    The last column is zero if `d_model` is odd; row `pad_token_id`, if there is one, is zero.
    """
    rows, half = config.max_position_embeddings + POSITION_OFFSET, config.d_model // 2
    step = np.float32(-math.log(10000) / (half - 1))
    exponents = np.arange(half, dtype=np.float32) * step
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.arange(rows, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    table = np.zeros((rows, config.d_model), dtype=np.float32)
    table[:, :half] = np.sin(angles)
    table[:, half : 2 * half] = np.cos(angles)
    if config.pad_token_id is not None and config.pad_token_id < rows:
        table[config.pad_token_id] = 0
    return table
