"""Twenty steps of each framework's own AdamW, fed in each framework's own way, against those in float64 numpy."""

import functools
import importlib

import numpy as np
import pytest

from conformance import training
from conformance.random_weights import write_checkpoint

# The loss after 20 steps moves with every rounding of every gradient on the way. Measured: 2e-6 at worst.
CURVE = 1e-4


@functools.cache
def expected():
    return training.adamw_losses(training.batches())


def torch_losses(fw, model, batches):
    torch = importlib.import_module("torch")
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.LEARNING_RATE,
        betas=(training.B1, training.B2),
        eps=training.EPSILON,
        weight_decay=training.WEIGHT_DECAY,
    )
    for batch in batches:
        loss = fw.call(model, **batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def tf_losses(fw, model, batches):
    keras = importlib.import_module("keras")
    optimizer = keras.optimizers.AdamW(
        training.LEARNING_RATE, training.WEIGHT_DECAY, training.B1, training.B2, training.EPSILON
    )
    model.compile(optimizer, jit_compile=False)
    for batch in batches:
        model.reset_metrics()
        yield model.train_on_batch(batch, return_dict=True)["loss"]


def flax_losses(fw, model, batches):
    optax, xglm_flax = importlib.import_module("optax"), importlib.import_module("xglm_flax")
    optimizer = optax.adamw(
        training.LEARNING_RATE, training.B1, training.B2, training.EPSILON, weight_decay=training.WEIGHT_DECAY
    )
    step, state = xglm_flax.make_train_step(model, optimizer)
    for batch in batches:
        state, metrics = step(state, batch)
        yield float(metrics["loss"])


LOSSES = {"torch": torch_losses, "tf": tf_losses, "flax": flax_losses}


def test_twenty_steps(fw, tmp_path):
    write_checkpoint(tmp_path, training.CONFIG, training.SEED)
    model = fw.causal_lm.from_pretrained(tmp_path)
    losses = list(LOSSES[fw.name](fw, model, training.batches()))
    assert len(losses) == training.STEPS
    np.testing.assert_allclose(losses, expected(), rtol=CURVE)


def test_the_oracle_learns():
    losses = expected()
    assert len(losses) == training.STEPS
    assert max(losses[:3]) / min(losses[-3:]) > 1.1


@pytest.mark.parametrize("side", [0, 1])
def test_batches_are_padded_on_either_side(side):
    masks = [batch["attention_mask"] for batch in training.batches()[side::2]]
    assert all(mask.any(axis=1).all() for mask in masks)
    assert any((mask[:, -1 if side else 0] == 0).any() for mask in masks)
