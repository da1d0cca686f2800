"""Random checkpoints that are the same, bit for bit, on every machine."""

from __future__ import annotations

import math
import os
import zlib

import numpy as np

from xglm_core.checkpoint import DTYPES, save_checkpoint
from xglm_core.checkpoint.dtypes import convert
from xglm_core.config import XGLMConfig
from xglm_core.weight_names import WeightSpec, weight_specs


def random_weights(config: XGLMConfig, seed: int) -> dict[str, np.ndarray]:
    """All weights of a model by canonical name, float32, at scales that let every part of the model show in the logits.

    Scaled token embeddings are of order 1, as position embeddings are; so is what each matrix makes of a normed state.
    """
    specs = weight_specs(config, with_head=not config.tie_word_embeddings)
    return {spec.name: _random_weight(spec, config, seed) for spec in specs}


def write_checkpoint(folder: str | os.PathLike[str], config: XGLMConfig, seed: int, dtype: str = "float32") -> None:
    """Writes the checkpoint of `random_weights` to `folder`, rounded to `dtype`."""
    weights = random_weights(config, seed)
    specs = weight_specs(config, with_head=not config.tie_word_embeddings)
    save_checkpoint(
        folder, config, specs, DTYPES[dtype], lambda name: convert(weights[name], DTYPES["float32"], DTYPES[dtype])
    )


def _random_weight(spec: WeightSpec, config: XGLMConfig, seed: int) -> np.ndarray:
    mean, deviation = _moments(spec, config)
    # A stream of its own for each weight, so that one more weight changes no other. numpy promises that RandomState
    # never changes; uniform numbers take no logarithm, so no libm can change them either.
    stream = np.random.RandomState([seed, zlib.crc32(spec.name.encode())])
    uniform = 2 * stream.random_sample(spec.shape) - 1
    return (mean + deviation * math.sqrt(3) * uniform).astype(np.float32)


def _moments(spec: WeightSpec, config: XGLMConfig) -> tuple[float, float]:
    """Mean and standard deviation of a weight."""
    if spec.name.endswith("norm.weight"):
        return 1.0, 0.1
    if spec.name.endswith("bias"):
        return 0.0, 0.1
    if ".q_proj." in spec.name or ".k_proj." in spec.name:
        # Twice the variance makes attention choose: with less, the 2,048th position sees little but the mean.
        return 0.0, math.sqrt(2 / spec.shape[1])
    return 0.0, 1 / math.sqrt(spec.shape[1])
