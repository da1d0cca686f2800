"""Finds where the texts that the backends generated diverge, and whether that is a tie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xglm_core.compare.oracle import forward
from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig


@dataclass(frozen=True)
class Parting:
    """The first new token of a row on which the backends disagree.

    Attributes:
        token: the index among the new tokens.
        choices: the id that each backend chose.
        margin: how far, by the oracle, the logit of the least likely choice is below the largest logit, relative to the
            largest absolute logit; 0 is a tie.
    """

    token: int
    choices: dict[str, int]
    margin: float


def find_partings(
    generated: dict[str, np.ndarray],
    attention_mask: np.ndarray,
    config: XGLMConfig,
    read: Callable[[str], np.ndarray],
) -> list[Parting | None]:
    """Compares generated rows.

    Args:
        generated: ids by backend, int64 [rows, length + new]; `new` may differ.
        attention_mask: the mask of the prompts, int64 [rows, length].
        config: the model's configuration.
        read: the oracle's reader of weights; used only if the texts diverge.

    Returns:
        For each row, where its texts diverge, or None.
    """
    width = max(ids.shape[1] for ids in generated.values())
    pad = GenerationConfig.from_model(config).pad_id  # As after the end of a row.
    rows = np.stack(
        [np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=pad) for ids in generated.values()]
    )
    length = attention_mask.shape[1]
    partings: list[Parting | None] = []
    for row, mask in enumerate(attention_mask):
        same = (rows[:, row, length:] == rows[0, row, length:]).all(axis=0)
        if same.all():
            partings.append(None)
            continue
        token = int(same.argmin())
        choices = rows[:, row, length + token]
        prefix = rows[:1, row, : length + token]
        mask = np.concatenate([mask, np.ones(token, np.int64)])[None]
        logits = forward(config, read, prefix, mask).logits[0, -1]
        margin = float((logits.max() - logits[choices].min()) / np.abs(logits).max())
        partings.append(Parting(token, dict(zip(generated, choices.tolist(), strict=True)), margin))
    return partings
