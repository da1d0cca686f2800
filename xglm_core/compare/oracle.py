"""The oracle: XGLM's forward pass and loss in float64 numpy, written from the formulas, independent of all other code.

The backends are judged by it. So it uses neither their code nor `xglm_core.positions`, and prefers plain formulas to
fast ones. Only the position table is not float64: its definition rounds to float32 (docs/numerics.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xglm_core.checkpoint import DTYPES, Checkpoint
from xglm_core.config import XGLMConfig

_VOCABULARY_BLOCK = 4096  # So many rows of the head are converted to float64 at a time, which limits memory.

Array = np.ndarray[Any, np.dtype[np.float64]]
Read = Callable[[str], np.ndarray]


@dataclass
class OracleOutput:
    """The results of the oracle.

    Attributes:
        hidden_states: num_layers + 1 arrays [batch, length, d_model], float64: the input of each block, then the state
            after the final norm.
        logits: [batch, length, vocab_size], float64; vocab_size is 0 if not requested.
        attentions: num_layers arrays [batch, heads, length, length], float64: the weights of the values, softmax
            probabilities times the head mask; empty if not requested.
        cross_attentions: the same for the encoder states, [batch, heads, length, encoder_length]; empty without them.
    """

    hidden_states: list[np.ndarray]
    logits: np.ndarray
    attentions: list[np.ndarray] = field(default_factory=list)
    cross_attentions: list[np.ndarray] = field(default_factory=list)


def forward(
    config: XGLMConfig,
    read: Read,
    input_ids: np.ndarray | None = None,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    *,
    inputs_embeds: np.ndarray | None = None,
    encoder_hidden_states: np.ndarray | None = None,
    encoder_attention_mask: np.ndarray | None = None,
    head_mask: np.ndarray | None = None,
    cross_attn_head_mask: np.ndarray | None = None,
    logits: bool = True,
    attentions: bool = False,
) -> OracleOutput:
    """Runs the model.

    Args:
        config: the architecture, with a named activation and without pruned heads.
        read: returns a weight by canonical name, in canonical shape, in any floating-point type of numpy. One matrix is
            held at a time, and neither embedding nor head is ever converted to float64 as a whole.
        input_ids: [batch, length]; ignored if there are `inputs_embeds`.
        attention_mask: nonzero for tokens, 0 for padding [batch, length]; None means no padding.
        position_ids: [batch, length]; None counts the tokens of each row from 0.
        inputs_embeds: scaled embeddings in place of the tokens [batch, length, d_model].
        encoder_hidden_states: states for cross-attention [batch, encoder_length, d_model]; None skips it.
        encoder_attention_mask: 0 for hidden encoder positions [batch, encoder_length]; None hides none.
        head_mask: factors of the self-attention probabilities [num_layers, attention_heads]; None means 1.
        cross_attn_head_mask: the same for cross-attention.
        logits: whether to compute the logits: batch x length x vocab_size x 8 bytes.
        attentions: whether to keep the probabilities: num_layers x batch x heads x length x keys x 8 bytes.

    Returns:
        Hidden states, logits and attention probabilities. Those of padding are finite, but have no meaning.
    """
    if inputs_embeds is None:
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        inputs_embeds = read("model.embed_tokens.weight")[input_ids].astype(np.float64) * scale
    batch, length, _ = inputs_embeds.shape
    mask = _or_ones(attention_mask, (batch, length)) != 0
    visible = np.tri(length, dtype=bool) & mask[:, None, :]
    if position_ids is None:
        position_ids = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    if encoder_hidden_states is not None:
        encoder_mask = _or_ones(encoder_attention_mask, encoder_hidden_states.shape[:2]) != 0
    head_mask = _or_ones(head_mask, (config.num_layers, config.attention_heads))
    cross_attn_head_mask = _or_ones(cross_attn_head_mask, (config.num_layers, config.attention_heads))

    output = OracleOutput([], np.empty((batch, length, 0)))
    state = inputs_embeds + position_embeddings(config, position_ids)
    for i in range(config.num_layers):
        output.hidden_states.append(state)
        layer = f"model.layers.{i}"
        normed = _norm(read, f"{layer}.self_attn_layer_norm", state)
        attended, weights = _attention(config, read, f"{layer}.self_attn", normed, normed, visible, head_mask[i])
        state = state + attended
        if attentions:
            output.attentions.append(weights)
        if encoder_hidden_states is not None:
            normed = _norm(read, f"{layer}.encoder_attn_layer_norm", state)
            name, source, shown = f"{layer}.encoder_attn", encoder_hidden_states, encoder_mask[:, None, :]
            attended, weights = _attention(config, read, name, normed, source, shown, cross_attn_head_mask[i])
            state = state + attended
            if attentions:
                output.cross_attentions.append(weights)
        normed = _norm(read, f"{layer}.final_layer_norm", state)
        state = state + _feed_forward(config, read, layer, normed)
    state = _norm(read, "model.layer_norm", state)
    output.hidden_states.append(state)

    if logits:
        head = read("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
        output.logits = _logits(state, head)
    return output


def loss(
    logits: np.ndarray,
    labels: np.ndarray,
    num_items_in_batch: int | None = None,
    *,
    attention_mask: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> float:
    """The cross-entropy of the next token.

    Args:
        logits: [batch, length, vocab_size].
        labels: ids, or -100 where nothing is predicted [batch, length]. Position t predicts the label of position
            t + 1: no position predicts the first label, and the last position predicts none.
        num_items_in_batch: the divisor of the sum; None means the sum of the weights of the predicted labels.
        attention_mask: nonzero for tokens, 0 for padding, which predicts nothing [batch, length]; None means no
            padding.
        weights: the weight of each label [batch, length]; None means 1.
        label_smoothing: the part of each target that is spread over the whole vocabulary.
        z_loss: the factor of the squared logarithm of the sum of exponentials, which is added.

    Returns:
        The mean, or 0 if nothing is predicted.
    """
    targets = labels[:, 1:]
    counted = (targets != -100) & (_or_ones(attention_mask, labels.shape)[:, :-1] != 0)
    weights = _or_ones(weights, labels.shape)[:, 1:][counted]
    scores = logits[:, :-1][counted].astype(np.float64)
    highest = scores.max(axis=-1, keepdims=True)
    log_total = highest[:, 0] + np.log(np.exp(scores - highest).sum(axis=-1))
    of_targets = scores[np.arange(len(scores)), targets[counted]]
    expected = (1 - label_smoothing) * of_targets + label_smoothing * scores.mean(axis=-1)
    losses = log_total - expected + z_loss * log_total**2
    divisor = weights.sum() if num_items_in_batch is None else num_items_in_batch
    return float((weights * losses).sum() / divisor) if divisor else 0.0


def checkpoint_reader(checkpoint: Checkpoint) -> Read:
    """A reader of a checkpoint for `forward`: returns views of the file, float32 copies of bfloat16 and int8."""

    def read(name: str) -> np.ndarray:
        stored = checkpoint.info(name).dtype
        return checkpoint.read(name, DTYPES["float32"] if stored.name in ("bfloat16", "int8") else stored)

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


def _or_ones(array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape) if array is None else np.asarray(array)


def _norm(read: Read, name: str, state: Array) -> Array:
    centred = state - state.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    scaled: Array = centred / np.sqrt(variance + 1e-5) * read(f"{name}.weight")
    return scaled + read(f"{name}.bias")


def _dense(read: Read, name: str, state: Array) -> Array:
    return state @ read(f"{name}.weight").astype(np.float64).T + read(f"{name}.bias")


def _attention(
    config: XGLMConfig,
    read: Read,
    name: str,
    state: Array,
    source: np.ndarray,
    visible: np.ndarray,
    head_mask: np.ndarray,
) -> tuple[Array, Array]:
    """Attention of `state` to `source` [batch, keys, d_model] where `visible` [batch, length or 1, keys].

    Returns:
        The update of the state, and the weights of the values [batch, heads, length, keys].
    """
    batch, length, _ = state.shape
    size = config.d_model // config.attention_heads
    query = _dense(read, f"{name}.q_proj", state) / math.sqrt(size)
    key = _dense(read, f"{name}.k_proj", source)
    value = _dense(read, f"{name}.v_proj", source)
    weights = np.empty((batch, config.attention_heads, length, source.shape[1]))
    mixed = np.empty_like(state)
    for row in range(batch):
        for head in range(config.attention_heads):
            columns = slice(head * size, (head + 1) * size)
            scores = query[row, :, columns] @ key[row, :, columns].T
            weights[row, head] = _softmax(scores, visible[row]) * head_mask[head]
            mixed[row, :, columns] = weights[row, head] @ value[row, :, columns]
    return _dense(read, f"{name}.out_proj", mixed), weights


def _softmax(scores: Array, visible: np.ndarray) -> Array:
    """Softmax over the visible keys; all zeros if none is visible."""
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
