"""Calls with the arguments that the cases lack: head masks, encoder states, embeddings instead of ids, labels.

As in `conformance.cases`, each is there for one reason, and made of numbers that are the same on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.config import XGLMConfig


@dataclass(frozen=True, eq=False)
class CallCase:
    """A model and a call of it.

    Attributes:
        name: identifies the case in reports and in the file of golden numbers.
        config: the architecture.
        seed: for `random_weights`.
        arguments: by their names in the backends; int64, and float32 for states and head masks. There always are
            `attention_mask` and the `position_ids` that follow from it, which transformers has to be told.
        why: what this case alone can show.
    """

    name: str
    config: XGLMConfig
    seed: int
    arguments: dict[str, np.ndarray]
    why: str

    @property
    def real(self) -> np.ndarray:
        """Which positions are no padding: bool [batch, length]. What comes out at the others means nothing."""
        return self.arguments["attention_mask"].astype(bool)


def _config(**others: Any) -> XGLMConfig:
    return XGLMConfig(vocab_size=131, d_model=35, attention_heads=5, ffn_dim=53, num_layers=3, **others)


def _mask(*rows: str) -> np.ndarray:
    """A mask drawn by rows: "." is padding and "x" a token."""
    return np.array([[character == "x" for character in row] for row in rows], np.int64)


_MASK = _mask("...xxxxxxxx", "xxxxxxxxxxx", "xxxxxxxxxxx")
_MASKS = {"attention_mask": _MASK, "position_ids": np.maximum(_MASK.cumsum(axis=1) - 1, 0)}


def _ids(seed: int, config: XGLMConfig) -> np.ndarray:
    """Random ids; transformers gives the embedding of the padding id no gradient, so no token has that id."""
    ids = np.random.RandomState(seed).randint(3, config.vocab_size, _MASK.shape, dtype=np.int64)
    ids[_MASK == 0] = 1
    return ids


def _labels(ids: np.ndarray) -> np.ndarray:
    """The ids, but -100 for padding and for what padding would have to predict: the token that follows it."""
    labels = np.where(_MASK == 1, ids, -100)
    labels[:, 1:][_MASK[:, :-1] == 0] = -100
    return labels


def _states(seed: int, length: int, config: XGLMConfig) -> np.ndarray:
    """Random states of variance 1, as scaled embeddings have: float32 [batch, length, d_model]."""
    uniform = 2 * np.random.RandomState(seed).random_sample((len(_MASK), length, config.d_model)) - 1
    return (math.sqrt(3) * uniform).astype(np.float32)


_HEAD_MASK = np.array([[1, 0.5, 1, 0, 1], [0, 1, 1, 1, 0.5], [1, 1, 0, 0.5, 0]], np.float32)
_CROSS_HEAD_MASK = np.array([[0.5, 1, 0, 1, 1], [1, 0, 0.5, 1, 0], [0, 1, 1, 0.5, 1]], np.float32)


def _head_mask_case(seed: int) -> CallCase:
    config = _config()
    arguments = {"input_ids": _ids(seed, config), **_MASKS, "head_mask": _HEAD_MASK}
    return CallCase("head_mask", config, seed, arguments, "head masks scale probabilities, and the scaled are returned")


def _cross_attention_case(seed: int) -> CallCase:
    config = _config(add_cross_attention=True, tie_word_embeddings=False)
    ids = _ids(seed, config)
    labels = _labels(ids)
    labels[1, 2:5] = labels[2, 7] = -100
    arguments = {
        "input_ids": ids,
        **_MASKS,
        "encoder_hidden_states": _states(seed + 1000, 7, config),
        "encoder_attention_mask": _mask("xxxxxxx", "xxxx...", "..xxxxx"),
        "head_mask": _HEAD_MASK,
        "cross_attn_head_mask": _CROSS_HEAD_MASK,
        "labels": labels,
    }
    why = "every argument at once; an encoder shorter than the text, with padding; ignored labels; an untied head"
    return CallCase("cross_attention", config, seed, arguments, why)


def _inputs_embeds_case(seed: int) -> CallCase:
    config = _config()
    embeddings = _states(seed + 1000, _MASK.shape[1], config)
    arguments = {"inputs_embeds": embeddings, **_MASKS, "labels": _labels(_ids(seed, config))}
    return CallCase("inputs_embeds", config, seed, arguments, "embeddings are not scaled; the tied head alone learns")


def _labels_case(seed: int) -> CallCase:
    config = _config()
    ids = _ids(seed, config)
    arguments = {"input_ids": ids, **_MASKS, "labels": _labels(ids)}
    return CallCase("labels", config, seed, arguments, "a tied embedding learns from both its uses")


CALL_CASES: tuple[CallCase, ...] = (
    _head_mask_case(31),
    _cross_attention_case(32),
    _inputs_embeds_case(33),
    _labels_case(34),
)
