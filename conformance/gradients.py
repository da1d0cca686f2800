"""Loss and gradients in float64 numpy, derived by hand: what the backends' automatic differentiation is judged by.

Each formula stands beside its reverse: a function returns its value, and a function from the gradient of the loss by
that value to the gradient by what went in. On the way back the gradients by the weights are added up by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from xglm_core.compare.oracle import Array, Read, position_embeddings
from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_core.weight_names import EMBEDDING, HEAD, weight_specs

Reverse = Callable[[Array], Array]
Step = Callable[[Array], tuple[Array, Reverse]]


def loss_and_gradients(
    config: XGLMConfig,
    read: Read,
    input_ids: np.ndarray | None,
    labels: np.ndarray,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    *,
    inputs_embeds: np.ndarray | None = None,
    encoder_hidden_states: np.ndarray | None = None,
    encoder_attention_mask: np.ndarray | None = None,
    head_mask: np.ndarray | None = None,
    cross_attn_head_mask: np.ndarray | None = None,
    num_items_in_batch: int | None = None,
    weights: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[float, dict[str, Array]]:
    """Runs a small model forth and back.

    Args:
        config: the architecture; its activation is one of the named ones, and no heads are pruned.
        read: gives a weight by canonical name, in canonical shape.
        input_ids: [batch, length]; not read if there are `inputs_embeds`.
        labels: ids, or -100 where nothing is to be predicted [batch, length]; position t predicts that of t + 1, unless
            it is padding.
        attention_mask: nonzero for tokens, 0 for padding [batch, length]; None means no padding.
        position_ids: [batch, length]; None counts the tokens of each row from 0.
        inputs_embeds: what stands for the scaled embeddings of the tokens [batch, length, d_model].
        encoder_hidden_states: what the blocks also attend to [batch, encoder_length, d_model]; None skips that part.
        encoder_attention_mask: 0 for encoder states to hide [batch, encoder_length]; None hides none.
        head_mask: factors of the self-attention probabilities [num_layers, attention_heads]; None means 1.
        cross_attn_head_mask: the same for cross-attention.
        num_items_in_batch: what to divide the loss by; None means the sum of the weights of the predicted labels.
        weights: of each label [batch, length]; None means 1.
        label_smoothing: the part of each target that is spread over the whole vocabulary.
        z_loss: factor of the squared log of the sum of exponentials, which is added.

    Returns:
        The loss, and its gradient by each weight under the canonical name, by `inputs_embeds` and by
        `encoder_hidden_states` under theirs if they were given. What the loss does not depend on has the gradient 0.
    """
    specs = weight_specs(config, with_head=not config.tie_word_embeddings)
    given = {"inputs_embeds": inputs_embeds, "encoder_hidden_states": encoder_hidden_states}
    arrays = {name: array for name, array in given.items() if array is not None}
    leaves = _Leaves({spec.name: read(spec.name) for spec in specs} | arrays)

    if inputs_embeds is None:
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        state, reverse_embedding = _embedding(leaves, np.asarray(input_ids), scale)
    else:
        state, reverse_embedding = _given_embeddings(leaves)
    mask = np.ones(state.shape[:2], bool) if attention_mask is None else attention_mask != 0
    visible = np.tri(state.shape[1], dtype=bool) & mask[:, None, None, :]
    shown = np.ones(1, bool) if encoder_attention_mask is None else encoder_attention_mask[:, None, None, :] != 0
    ones = np.ones((config.num_layers, config.attention_heads))
    head_mask = ones if head_mask is None else head_mask
    cross_attn_head_mask = ones if cross_attn_head_mask is None else cross_attn_head_mask
    if position_ids is None:
        position_ids = np.maximum(np.cumsum(mask, axis=1) - 1, 0)

    steps: list[Step] = []
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        part: Step = partial(_attention, leaves, f"{layer}.self_attn", visible, head_mask[i], None)
        steps.append(partial(_residual, leaves, f"{layer}.self_attn_layer_norm", part))
        if encoder_hidden_states is not None:
            name, source = f"{layer}.encoder_attn", "encoder_hidden_states"
            part = partial(_attention, leaves, name, shown, cross_attn_head_mask[i], source)
            steps.append(partial(_residual, leaves, f"{layer}.encoder_attn_layer_norm", part))
        part = partial(_feed_forward, leaves, layer, _ACTIVATIONS[str(config.activation_function)])
        steps.append(partial(_residual, leaves, f"{layer}.final_layer_norm", part))
    steps.append(partial(_norm, leaves, "model.layer_norm"))
    steps.append(partial(_product, leaves, EMBEDDING if config.tie_word_embeddings else HEAD))

    state = state + position_embeddings(config, position_ids)
    reverses = [reverse_embedding]
    for step in steps:
        state, reverse = step(state)
        reverses.append(reverse)
    weights = np.ones(labels.shape) if weights is None else weights
    labels = np.where(np.roll(mask, 1, axis=1), labels, -100)  # The first label is nobody's.
    loss, gradient = _cross_entropy(state, labels, weights, num_items_in_batch, label_smoothing, z_loss)
    for reverse in reversed(reverses):
        gradient = reverse(gradient)
    return loss, leaves.gradients


class _Leaves:
    """What the loss is differentiated by, in float64, and the gradients so far."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.values: dict[str, Array] = {name: array.astype(np.float64) for name, array in arrays.items()}
        self.gradients: dict[str, Array] = {name: np.zeros_like(value) for name, value in self.values.items()}


def _embedding(leaves: _Leaves, input_ids: np.ndarray, scale: float) -> tuple[Array, Reverse]:
    """The rows of the tokens, scaled."""

    def reverse(gradient: Array) -> Array:
        np.add.at(leaves.gradients[EMBEDDING], input_ids, gradient * scale)  # A token may occur more than once.
        return gradient

    return leaves.values[EMBEDDING][input_ids] * scale, reverse


def _given_embeddings(leaves: _Leaves) -> tuple[Array, Reverse]:
    """What the caller computed from tokens, or from anything else."""

    def reverse(gradient: Array) -> Array:
        leaves.gradients["inputs_embeds"] += gradient
        return gradient

    return leaves.values["inputs_embeds"], reverse


def _residual(leaves: _Leaves, norm: str, part: Step, state: Array) -> tuple[Array, Reverse]:
    """The state plus what a part of the block makes of it once normed."""
    normed, reverse_norm = _norm(leaves, norm, state)
    added, reverse_part = part(normed)
    return state + added, lambda gradient: gradient + reverse_norm(reverse_part(gradient))


def _norm(leaves: _Leaves, name: str, state: Array) -> tuple[Array, Reverse]:
    """The state at mean 0 and variance 1, times the weight, plus the bias."""
    weight, bias = leaves.values[f"{name}.weight"], leaves.values[f"{name}.bias"]
    deviation = np.sqrt(state.var(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    unit = (state - state.mean(axis=-1, keepdims=True)) / deviation

    def reverse(gradient: Array) -> Array:
        leaves.gradients[f"{name}.weight"] += (gradient * unit).sum(axis=(0, 1))
        leaves.gradients[f"{name}.bias"] += gradient.sum(axis=(0, 1))
        by_unit = gradient * weight
        along_unit = unit * (by_unit * unit).mean(axis=-1, keepdims=True)
        by_state: Array = (by_unit - by_unit.mean(axis=-1, keepdims=True) - along_unit) / deviation
        return by_state

    return unit * weight + bias, reverse


def _dense(leaves: _Leaves, name: str, state: Array) -> tuple[Array, Reverse]:
    """A matrix product with the transposed weight, plus the bias."""
    product, reverse_product = _product(leaves, f"{name}.weight", state)

    def reverse(gradient: Array) -> Array:
        leaves.gradients[f"{name}.bias"] += gradient.sum(axis=(0, 1))
        return reverse_product(gradient)

    return product + leaves.values[f"{name}.bias"], reverse


def _product(leaves: _Leaves, name: str, state: Array) -> tuple[Array, Reverse]:
    """A matrix product with the transposed weight."""
    weight = leaves.values[name]

    def reverse(gradient: Array) -> Array:
        leaves.gradients[name] += np.einsum("blo,bli->oi", gradient, state)
        return gradient @ weight

    return state @ weight.T, reverse


def _attention(
    leaves: _Leaves, name: str, visible: np.ndarray, head_mask: np.ndarray, source: str | None, state: Array
) -> tuple[Array, Reverse]:
    """In each head softmax(q k^T / sqrt(size)) v, with keys and values of a leaf or, for None, of the state itself."""
    attended = state if source is None else leaves.values[source]
    heads = len(head_mask)
    factors = head_mask[:, None, None]
    query, reverse_query = _dense(leaves, f"{name}.q_proj", state)
    key, reverse_key = _dense(leaves, f"{name}.k_proj", attended)
    value, reverse_value = _dense(leaves, f"{name}.v_proj", attended)
    q, k, v = _split(query, heads), _split(key, heads), _split(value, heads)
    scale = 1 / math.sqrt(q.shape[-1])
    probabilities, reverse_softmax = _softmax(q @ k.swapaxes(-1, -2) * scale, visible)
    weights = probabilities * factors
    output, reverse_output = _dense(leaves, f"{name}.out_proj", _join(weights @ v))

    def reverse(gradient: Array) -> Array:
        by_mixed = _split(reverse_output(gradient), heads)
        by_v = weights.swapaxes(-1, -2) @ by_mixed
        by_scores = reverse_softmax(by_mixed @ v.swapaxes(-1, -2) * factors) * scale
        by_state = reverse_query(_join(by_scores @ k))
        by_attended = reverse_key(_join(by_scores.swapaxes(-1, -2) @ q)) + reverse_value(_join(by_v))
        if source is None:
            return by_state + by_attended
        leaves.gradients[source] += by_attended
        return by_state

    return output, reverse


def _split(state: Array, heads: int) -> Array:
    """[batch, length, d_model] as [batch, heads, length, size]; `_join` is its reverse."""
    return state.reshape(*state.shape[:2], heads, -1).swapaxes(1, 2)


def _join(split: Array) -> Array:
    batch, _, length, _ = split.shape
    return split.swapaxes(1, 2).reshape(batch, length, -1)


def _softmax(scores: Array, visible: np.ndarray) -> tuple[Array, Reverse]:
    """Softmax over the visible keys; all zeros where none is visible."""
    masked = np.where(visible, scores, np.finfo(np.float64).min)
    powers = np.exp(masked - masked.max(axis=-1, keepdims=True)) * visible
    total = powers.sum(axis=-1, keepdims=True)
    probabilities: Array = powers / np.where(total > 0, total, 1)

    def reverse(gradient: Array) -> Array:
        by_scores: Array = probabilities * (gradient - (gradient * probabilities).sum(axis=-1, keepdims=True))
        return by_scores

    return probabilities, reverse


def _feed_forward(leaves: _Leaves, layer: str, activation: Step, state: Array) -> tuple[Array, Reverse]:
    inner, reverse_fc1 = _dense(leaves, f"{layer}.fc1", state)
    active, reverse_activation = activation(inner)
    output, reverse_fc2 = _dense(leaves, f"{layer}.fc2", active)
    return output, lambda gradient: reverse_fc1(reverse_activation(reverse_fc2(gradient)))


def _gelu(x: Array) -> tuple[Array, Reverse]:
    """The normal distribution function, times x."""
    distribution = (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return x * distribution, lambda gradient: gradient * (distribution + x * density)


def _gelu_new(x: Array) -> tuple[Array, Reverse]:
    """GELU with tanh(sqrt(2 / pi) (x + 0.044715 x^3)) in place of the error function."""
    factor = math.sqrt(2 / math.pi)
    tanh = np.tanh(factor * (x + 0.044715 * x**3))
    slope = (1 - tanh**2) * factor * (1 + 3 * 0.044715 * x**2)
    return x * (1 + tanh) / 2, lambda gradient: gradient * (1 + tanh + x * slope) / 2


def _silu(x: Array) -> tuple[Array, Reverse]:
    """The logistic function, times x."""
    logistic = (1 + np.tanh(x / 2)) / 2
    return x * logistic, lambda gradient: gradient * logistic * (1 + x * (1 - logistic))


def _relu(x: Array) -> tuple[Array, Reverse]:
    return np.maximum(x, 0), lambda gradient: gradient * (x > 0)


_ACTIVATIONS: dict[str, Step] = {"gelu": _gelu, "gelu_new": _gelu_new, "silu": _silu, "relu": _relu}


def _cross_entropy(
    logits: Array,
    labels: np.ndarray,
    weights: np.ndarray,
    num_items_in_batch: int | None,
    label_smoothing: float,
    z_loss: float,
) -> tuple[float, Array]:
    """The loss, and its gradient by the logits: at each position that counts, softmax less the smoothed target."""
    batch, position = np.nonzero(labels[:, 1:] != -100)
    target = labels[batch, position + 1]
    weight = weights[batch, position + 1]
    divisor = weight.sum() if num_items_in_batch is None else num_items_in_batch
    factor = (weight / divisor if divisor else np.zeros(len(weight)))[:, None]
    scores = logits[batch, position]
    highest = scores.max(axis=-1, keepdims=True)
    log_total = highest + np.log(np.exp(scores - highest).sum(axis=-1, keepdims=True))
    one_hot = np.arange(logits.shape[-1]) == target[:, None]
    smoothed = (1 - label_smoothing) * one_hot + label_smoothing / logits.shape[-1]
    gradient = np.zeros_like(logits)
    softmax = np.exp(scores - log_total)
    gradient[batch, position] = factor * (softmax * (1 + 2 * z_loss * log_total) - smoothed)
    losses = log_total - (smoothed * scores).sum(axis=-1, keepdims=True) + z_loss * log_total**2
    return float((factor * losses).sum()), gradient
