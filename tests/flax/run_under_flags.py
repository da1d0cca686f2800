"""Run by the tests under flags of JAX that users set: the numbers are those of the oracle, in the types as without."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conformance.gradients import loss_and_gradients
from conformance.random_weights import random_weights
from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from xglm_core.compare import oracle
from xglm_core.loss import LossOptions
from xglm_core.weight_names import weight_specs
from xglm_flax import FlaxXGLMForCausalLM, make_loss_fn, make_mesh, make_train_step
from xglm_flax.weights import read_weight

SMALL = changed(CONFIG, num_layers=1, dropout=0.0, attention_dropout=0.0)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01}
LABELS = np.where(LEFT == 1, IDS, -100)
BATCH = {"input_ids": IDS, "attention_mask": LEFT, "labels": LABELS}
CHOICES = {
    "greedy": {},
    "drawn": {"do_sample": True, "top_k": 5, "top_p": 0.9, "typical_p": 0.9, "repetition_penalty": 1.2, "seed": 0},
    "beams": {"do_sample": True, "num_beams": 3, "top_k": 0, "top_p": 0.9, "seed": 0},
}


def continued(model: FlaxXGLMForCausalLM, name: str) -> list[list[int]]:
    return np.asarray(model.generate(IDS, LEFT, max_new_tokens=5, **CHOICES[name])).tolist()


def check(folder: str, expected: dict[str, list[list[int]]]) -> None:
    read = random_weights(SMALL, 1).__getitem__
    model = FlaxXGLMForCausalLM.from_pretrained(folder)
    model.loss_options = LossOptions(**OPTIONS)
    differentiated = jax.value_and_grad(make_loss_fn(model))
    loss, gradients = differentiated(model.params, BATCH)
    due, slopes = loss_and_gradients(SMALL, read, **BATCH, **OPTIONS)
    check_gradients(loss, gradients, due, slopes)
    check_gradients(*on_two_devices(differentiated, model.params), due, slopes)

    logits = oracle.forward(SMALL, read, IDS).logits[:, :-1]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores = model.score(IDS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.take_along_axis(logs, IDS[:, 1:, None], -1)[..., 0], rtol=0, atol=1e-5)
    for name in CHOICES:
        assert continued(model, name) == expected[name], name

    # Adam of optax leaves types to promotion.
    step, state = make_train_step(model, optax.sgd(0.1, momentum=0.9), accumulation_steps=2)
    types = jax.tree.map(lambda leaf: leaf.dtype, state)
    state, metrics = step(state, BATCH)
    assert types == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert {value.dtype.name for value in metrics.values()} == {"float32"}
    np.testing.assert_allclose(metrics["loss"], due, rtol=1e-5)
    half = FlaxXGLMForCausalLM.from_pretrained(folder, dtype="bfloat16")
    loss = jax.value_and_grad(make_loss_fn(half))(half.params, BATCH)[0]
    assert loss.dtype == jnp.float32
    assert np.isfinite(float(loss))
    assert np.isfinite(half.score(IDS)).all()


def check_gradients(loss, gradients, due, slopes):
    assert loss.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}
    np.testing.assert_allclose(loss, due, rtol=1e-6)
    for spec in weight_specs(SMALL, with_head=False):
        np.testing.assert_allclose(read_weight(gradients, spec), slopes[spec.name], **SAME)


def on_two_devices(differentiated, params):
    """The rows divided by hand; `jax.shard_map` checks what differs among the devices."""
    mesh = make_mesh(2)
    rows, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def part(params, batch):
        # Each device has a row, of 7 and of 10 labels that count.
        loss, gradients = differentiated(params, batch, None, 17)
        return jax.lax.psum(loss, "data"), gradients

    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(same, rows), out_specs=(same, same)))(params, BATCH)


if __name__ == "__main__":
    check(sys.argv[1], json.loads(sys.argv[2]))
    print("as without")
