"""The gradients derived by hand, against differences of the oracle's loss, which knows no derivative."""

import numpy as np
import pytest

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights
from xglm_core import XGLMConfig
from xglm_core.compare import oracle

# A difference quotient in float64 errs by the rounding of a loss of order 1, a few 1e-16 / STEP, and by STEP^2 times a
# third derivative of order 1: some 1e-10 together, for gradients that are 0.01 to 2 long.
# No input of a ReLU lies within STEP of its kink.
STEP = 1e-5
TOLERANCE = 1e-9

SMALL = {"vocab_size": 17, "d_model": 15, "attention_heads": 3, "ffn_dim": 11, "num_layers": 2}
IDS = np.array([[3, 5, 5, 16, 0, 9, 3], [12, 7, 5, 1, 12, 2, 8]])  # Tokens recur within a row and between rows.
LABELS = np.array([[3, 5, -100, 16, 0, 9, 3], [-100, -100, 5, 1, 12, -100, -100]])
WEIGHTS = np.random.RandomState(6).random_sample(LABELS.shape)
STATES, ENCODER = (np.random.RandomState(length).standard_normal((2, length, 15)) for length in (7, 4))
HEAD_MASK = np.array([[1, 0, 0.5], [0.25, 1, 1]])
CROSS_HEAD_MASK = np.array([[0.5, 1, 0], [1, 0.75, 1]])
HOLES = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]])

# Name: what differs in the configuration, the arguments.
CASES = {
    **{name: ({"activation_function": name}, {}) for name in ("gelu", "relu", "silu", "gelu_new")},
    "unscaled": ({"scale_embedding": False, "d_model": 12}, {}),
    # The first two positions of the first row, and those of a gap, see no key of their own and predict nothing.
    "padding": ({}, {"attention_mask": HOLES, "labels": IDS}),
    "positions": ({}, {"position_ids": np.array([[4, 0, 1, 1, 2, 9, 3], [0, 1, 2, 3, 4, 5, 6]])}),
    "ignored": ({}, {"labels": LABELS}),
    "items": ({}, {"labels": LABELS, "num_items_in_batch": 29}),
    "options": ({}, {"labels": LABELS, "weights": WEIGHTS, "label_smoothing": 0.125, "z_loss": 0.25}),
    "untied": ({"tie_word_embeddings": False}, {}),
    "head_mask": ({}, {"head_mask": HEAD_MASK}),
    "embeddings": ({}, {"input_ids": None, "inputs_embeds": STATES}),
    "no_encoder": ({"add_cross_attention": True}, {}),
    "encoder": ({"add_cross_attention": True}, {"encoder_hidden_states": ENCODER}),
    "encoder_padding": (
        {"add_cross_attention": True},
        # The second row of the encoder is padding alone.
        {"encoder_hidden_states": ENCODER, "encoder_attention_mask": np.array([[0, 1, 1, 0], [0, 0, 0, 0]])},
    ),
    "everything": (
        {"add_cross_attention": True, "tie_word_embeddings": False, "activation_function": "silu"},
        {
            "input_ids": None,
            "inputs_embeds": STATES,
            "attention_mask": HOLES,
            "encoder_hidden_states": ENCODER,
            "encoder_attention_mask": np.array([[1, 1, 1, 0], [0, 1, 1, 1]]),
            "head_mask": HEAD_MASK,
            "cross_attn_head_mask": CROSS_HEAD_MASK,
            "labels": LABELS,
        },
    ),
}


def prepare(name):
    """The configuration, the weights in float64, and the arguments of a case."""
    options, arguments = CASES[name]
    config = XGLMConfig(**{**SMALL, **options})
    weights = {name: weight.astype(np.float64) for name, weight in random_weights(config, 5).items()}
    return config, weights, {"input_ids": IDS, "labels": IDS, **arguments}


def loss_of_oracle(config, leaves, arguments):
    """The loss, in which `leaves` are the weights and the states that are differentiated by."""
    arguments = {name: leaves.get(name, value) for name, value in arguments.items()}
    names = ("labels", "num_items_in_batch", "weights", "label_smoothing", "z_loss")
    options = {name: arguments.pop(name) for name in names if name in arguments}
    logits = oracle.forward(config, leaves.__getitem__, **arguments).logits
    return oracle.loss(logits, attention_mask=arguments.get("attention_mask"), **options)


def directions(gradient, stream):
    """A random direction through all entries, the entry with the largest gradient, and two entries by chance."""
    yield stream.standard_normal(gradient.shape)
    for entry in (np.abs(gradient).argmax(), *stream.randint(gradient.size, size=2)):
        yield (np.arange(gradient.size) == entry).reshape(gradient.shape)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_differences_of_the_loss(name):
    config, weights, arguments = prepare(name)
    loss, gradients = loss_and_gradients(config, weights.__getitem__, **arguments)
    leaves = {
        **weights,
        **{key: arguments[key] for key in ("inputs_embeds", "encoder_hidden_states") if key in arguments},
    }
    assert gradients.keys() == leaves.keys()
    # A few float64 roundings: the two compute the same sums in another order.
    assert loss == pytest.approx(loss_of_oracle(config, leaves, arguments), rel=1e-14)

    stream = np.random.RandomState(1)
    for leaf, value in leaves.items():
        for direction in directions(gradients[leaf], stream):
            step = direction * STEP / np.linalg.norm(direction)
            above = loss_of_oracle(config, {**leaves, leaf: value + step}, arguments)
            below = loss_of_oracle(config, {**leaves, leaf: value - step}, arguments)
            assert abs(2 * (gradients[leaf] * step).sum() - (above - below)) < 2 * STEP * TOLERANCE, leaf


def test_only_what_the_loss_depends_on_has_a_gradient():
    config, weights, arguments = prepare("everything")
    _, gradients = loss_and_gradients(config, weights.__getitem__, **arguments)
    assert not gradients.pop("model.embed_tokens.weight").any()
    source, states = gradients["encoder_hidden_states"], gradients["inputs_embeds"]
    # Hidden encoder states.
    assert not source[arguments["encoder_attention_mask"] == 0].any()
    # What comes after the last position that predicts something.
    assert not states[0, 6].any()
    assert not states[1, 4:].any()
    for name, gradient in gradients.items():
        # Softmax takes the key bias out; float64 roundings remain.
        assert (np.abs(gradient).max() < 1e-15) == name.endswith("k_proj.bias"), name


def test_without_a_target_all_is_zero():
    config, weights, arguments = prepare("ignored")
    labels = np.full_like(IDS, -100)
    labels[:, 0] = 3  # No position predicts the first token.
    loss, gradients = loss_and_gradients(config, weights.__getitem__, **{**arguments, "labels": labels})
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
