"""Twenty steps of AdamW from the same weights on the same batches: in float64 numpy, for the backends to follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights
from xglm_core.config import XGLMConfig
from xglm_core.inputs import IGNORED_LABEL
from xglm_core.weight_names import weight_specs

STEPS = 20
CONFIG = XGLMConfig(
    vocab_size=131,
    max_position_embeddings=61,
    d_model=35,
    ffn_dim=53,
    num_layers=3,
    attention_heads=5,
    dropout=0.0,
    attention_dropout=0.0,
)
SEED = 1

# Keras adds epsilon before the correction of the bias of v, the others after it: at this size neither matters. With the
# usual b2 of 0.999 the first steps would follow the sign of each gradient alone, and rounding could turn it.
LEARNING_RATE, B1, B2, EPSILON, WEIGHT_DECAY = 1e-3, 0.9, 0.95, 1e-10, 0.01


def batches() -> list[dict[str, np.ndarray]]:
    """A batch for each step: padded on either side, by chance; int64 [3, 13]."""
    stream, result = np.random.RandomState(7), []
    for step in range(STEPS):
        ids = stream.randint(4, CONFIG.vocab_size, (3, 13))
        right = np.arange(13) < stream.randint(5, 14, (3, 1))
        mask = (right if step % 2 else right[:, ::-1]).astype(np.int64)
        ids, labels = np.where(mask, ids, 1), np.where(mask, ids, IGNORED_LABEL)  # 1 is XGLM's padding.
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


def adamw_losses(given: Sequence[dict[str, np.ndarray]]) -> list[float]:
    """The loss before each step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2 with a constant schedule)."""
    names = [spec.name for spec in weight_specs(CONFIG, with_head=False)]
    stored = random_weights(CONFIG, SEED)
    weights = {name: stored[name].astype(np.float64) for name in names}
    first, second = ({name: np.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    losses = []
    for step, batch in enumerate(given, 1):
        loss, gradients = loss_and_gradients(
            CONFIG, weights.__getitem__, batch["input_ids"], batch["labels"], batch["attention_mask"]
        )
        losses.append(loss)
        for name, gradient in gradients.items():
            first[name] = B1 * first[name] + (1 - B1) * gradient
            second[name] = B2 * second[name] + (1 - B2) * gradient**2
            direction = first[name] / (1 - B1**step) / (np.sqrt(second[name] / (1 - B2**step)) + EPSILON)
            weights[name] = weights[name] - LEARNING_RATE * (direction + WEIGHT_DECAY * weights[name])
    return losses
