"""The oracle: XGLM's forward pass in float64 numpy, written from the formulas and shared with nothing.

It is what the backends are judged by, so it uses none of their code, nor `xglm_core.positions`, and prefers the plain
formula to the fast one. Only the position table is not float64: its definition rounds to float32 (docs/numerics.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.checkpoint import DTYPES, Checkpoint
from xglm_core.config import XGLMConfig

_VOCABULARY_BLOCK = 4096  # Rows of the head converted to float64 at a time: bounds the memory, changes no number.

Array = np.ndarray[Any, np.dtype[np.float64]]
Read = Callable[[str], np.ndarray]


@dataclass
class OracleOutput:
    """What the oracle computes.

    Attributes:
        hidden_states: num_layers + 1 arrays [batch, length, d_model], float64: the input of each block, then the state
            after the final norm.
        logits: [batch, length, vocab_size], float64; vocab_size is 0 if none were asked for.
    """

    hidden_states: list[np.ndarray]
    logits: np.ndarray


def forward(
    config: XGLMConfig,
    read: Read,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    *,
    logits: bool = True,
) -> OracleOutput:
    """Runs the model.

    Args:
        config: the architecture; its activation is one of the named ones.
        read: gives a weight by canonical name, in canonical shape, in any floating-point type of numpy. One
            matrix is held at a time, and neither embedding nor head is ever converted to float64 as a whole.
        input_ids: [batch, length].
        attention_mask: nonzero for tokens, 0 for padding [batch, length]; None means no padding.
        position_ids: [batch, length]; None counts the tokens of each row from 0.
        logits: whether to compute the logits: batch x length x vocab_size x 8 bytes.

    Returns:
        Hidden states and logits. Those of padding are finite and mean nothing.
    """
    mask = np.ones(input_ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if position_ids is None:
        position_ids = np.maximum(np.cumsum(mask, axis=1) - 1, 0)

    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    state = read("model.embed_tokens.weight")[input_ids].astype(np.float64) * scale
    state = state + position_embeddings(config, position_ids)

    hidden_states = []
    for i in range(config.num_layers):
        hidden_states.append(state)
        layer = f"model.layers.{i}"
        normed = _norm(read, f"{layer}.self_attn_layer_norm", state)
        state = state + _attention(config, read, f"{layer}.self_attn", normed, mask)
        normed = _norm(read, f"{layer}.final_layer_norm", state)
        state = state + _feed_forward(config, read, layer, normed)
    state = _norm(read, "model.layer_norm", state)
    hidden_states.append(state)

    if not logits:
        return OracleOutput(hidden_states, np.empty((*input_ids.shape, 0)))
    head = read("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    return OracleOutput(hidden_states, _logits(state, head))


def checkpoint_reader(checkpoint: Checkpoint) -> Read:
    """The weights of a checkpoint for `forward`: views of the file; bfloat16, which numpy lacks, as float32 copies."""

    def read(name: str) -> np.ndarray:
        stored = checkpoint.info(name).dtype
        return checkpoint.read(name, DTYPES["float32"] if stored.name == "bfloat16" else stored)

    return read


def position_embeddings(config: XGLMConfig, position_ids: np.ndarray) -> np.ndarray:
    """The rows of the position table for `position_ids`: [*position_ids.shape, d_model], float64.

    Position p has row r = p + 2: sin(r f_i) for i < half, cos(r f_i) for i < half, and a zero if d_model is odd, where
    half = d_model // 2 and f_i = 10000^(-i / (half - 1)). Each of the five steps rounds to float32.
    """
    half = config.d_model // 2
    step = np.float32(-math.log(10000) / (half - 1))
    frequencies = [np.float32(math.exp(np.float32(i) * step)) for i in range(half)]
    embeddings = np.zeros((*position_ids.shape, config.d_model))
    rows = position_ids + 2
    for i, frequency in enumerate(frequencies):
        angles = (rows.astype(np.float32) * frequency).astype(np.float64)
        embeddings[..., i] = np.sin(angles).astype(np.float32)
        embeddings[..., half + i] = np.cos(angles).astype(np.float32)
    embeddings[rows == config.pad_token_id] = 0
    return embeddings


def _norm(read: Read, name: str, state: Array) -> Array:
    centred = state - state.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    scaled: Array = centred / np.sqrt(variance + 1e-5) * read(f"{name}.weight")
    return scaled + read(f"{name}.bias")


def _dense(read: Read, name: str, state: Array) -> Array:
    return state @ read(f"{name}.weight").astype(np.float64).T + read(f"{name}.bias")


def _attention(config: XGLMConfig, read: Read, name: str, state: Array, mask: np.ndarray) -> Array:
    """Causal self-attention over the keys that are no padding."""
    batch, length, _ = state.shape
    size = config.d_model // config.attention_heads
    query = _dense(read, f"{name}.q_proj", state) / math.sqrt(size)
    key = _dense(read, f"{name}.k_proj", state)
    value = _dense(read, f"{name}.v_proj", state)
    causal = np.tri(length, dtype=bool)
    mixed = np.empty_like(state)
    for row in range(batch):
        visible = causal & mask[row]
        for head in range(config.attention_heads):
            columns = slice(head * size, (head + 1) * size)
            weights = _softmax(query[row, :, columns] @ key[row, :, columns].T, visible)
            mixed[row, :, columns] = weights @ value[row, :, columns]
    return _dense(read, f"{name}.out_proj", mixed)


def _softmax(scores: Array, visible: np.ndarray) -> Array:
    """Softmax over the visible keys; all zeros where none is visible."""
    scores = np.where(visible, scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def _feed_forward(config: XGLMConfig, read: Read, layer: str, state: Array) -> Array:
    activation = _ACTIVATIONS[str(config.activation_function)]
    return _dense(read, f"{layer}.fc2", activation(_dense(read, f"{layer}.fc1", state)))


def _logits(state: Array, head: np.ndarray) -> Array:
    logits = np.empty((*state.shape[:-1], len(head)))
    for begin in range(0, len(head), _VOCABULARY_BLOCK):
        block = slice(begin, begin + _VOCABULARY_BLOCK)
        logits[..., block] = state @ head[block].astype(np.float64).T
    return logits


def _erf(x: Array) -> Array:
    return np.fromiter(map(math.erf, x.flat), np.float64, x.size).reshape(x.shape)  # numpy has no erf.


def _gelu(x: Array) -> Array:
    return x / 2 * (1 + _erf(x / math.sqrt(2)))


def _gelu_new(x: Array) -> Array:
    tanh: Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x / 2 * (1 + tanh)


def _silu(x: Array) -> Array:
    tanh: Array = np.tanh(x / 2)  # The logistic function is (1 + tanh) / 2; in this form nothing overflows.
    return x / 2 * (1 + tanh)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


_ACTIVATIONS = {"gelu": _gelu, "gelu_new": _gelu_new, "silu": _silu, "relu": _relu}
