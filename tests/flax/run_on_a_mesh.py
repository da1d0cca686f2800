"""Run by the tests on eight virtual devices: a mesh gives what one device gives."""

from __future__ import annotations

import sys

import jax
import numpy as np
import optax

from tests.helpers.models import CONFIG, IDS, SAME, changed
from xglm_core.errors import InputError
from xglm_flax import (
    FlaxXGLMForCausalLM,
    make_eval_step,
    make_loss_fn,
    make_mesh,
    make_train_step,
    place_batch,
    place_params,
    stack_layers,
)

# 4 heads, 54 inner units, 132 words: all divide by 2, none by 8.
SIZES = {
    "vocab_size": 132,
    "d_model": 36,
    "attention_heads": 4,
    "ffn_dim": 54,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
LABELS = np.where(np.arange(11) < np.arange(8)[:, None], -100, np.tile(IDS, (4, 1)))
# Padding on the left of each row, and a gap: groups of devices differ in what counts.
MASK = np.where((np.arange(11) <= np.arange(8)[:, None]) | (np.arange(11) == 9), 0, 1)
BATCH = {"input_ids": np.tile(IDS, (4, 1)), "attention_mask": MASK, "labels": LABELS}


def same(ours, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), ours, expected)


def check(config, *, stacked, steps):
    model = FlaxXGLMForCausalLM(config, scan_layers=stacked)
    params = stack_layers(model.params) if stacked else model.params
    expected = jax.jit(jax.value_and_grad(make_loss_fn(model)))(params, BATCH)

    mesh = make_mesh(4, 2)
    there, batch = place_params(params, config, mesh), place_batch(BATCH, mesh)
    where = (None, jax.tree.map(lambda leaf: leaf.sharding, there))
    function = jax.jit(jax.value_and_grad(make_loss_fn(model, mesh=mesh)), out_shardings=where)
    compiled = function.lower(there, batch).compile()
    loss, gradients = compiled(there, batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    same(gradients, expected[1])
    # The vocabulary stays divided: no device has an array with all of it.
    text = compiled.as_text()
    assert f"f32[{config.vocab_size // 2}," in text
    assert f"[{config.vocab_size}," not in text, [
        line for line in text.splitlines() if f"[{config.vocab_size}," in line
    ]

    if not steps:
        # The plain call, which knows nothing of the mesh, on arrays that lie there.
        plain = jax.value_and_grad(lambda p, b: model(**b, params=p, return_logits=False, use_cache=False).loss)
        same(jax.jit(plain)(there, batch), expected)
        return
    step, state = make_train_step(model, optax.adamw(1e-3), params=params, mesh=mesh)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    alone, alone_state = make_train_step(model, optax.adamw(1e-3), accumulation_steps=2)
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        alone_state, alone_metrics = alone(alone_state, BATCH)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, alone_metrics[name], rtol=1e-5)
    table = state.opt_state[0].mu["model"]["embed_tokens"]["embedding"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(config.vocab_size // 2, config.d_model)}
    jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or 1 / 0, state, before)
    evaluated = make_eval_step(model, mesh=mesh)(state.params, BATCH)
    _, alone_metrics = alone(alone_state, BATCH)
    np.testing.assert_allclose(evaluated["loss"], alone_metrics["loss"], rtol=1e-5)


def check_optimizers():
    """Their state lies as the parameters do, whatever they make of the tree; the mesh is one as JAX itself makes it."""
    model = FlaxXGLMForCausalLM(changed(CONFIG, **SIZES, num_layers=1))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    kinds = jax.tree_util.tree_map_with_path(
        lambda path, leaf: "rest" if leaf.ndim < 2 else "factored" if "embed" in str(path) else "muon", model.params
    )
    optimizers = {
        "factored": optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9),
        "muon": optax.contrib.muon(1e-2),
        "rest": optax.masked(optax.adam(1e-2), lambda params: jax.tree.map(lambda leaf: True, params)),
    }
    step, state = make_train_step(model, optax.multi_transform(optimizers, kinds), mesh=mesh)
    alone, alone_state = make_train_step(model, optax.multi_transform(optimizers, kinds))
    for part in (state.params, state.opt_state):
        leaves = jax.tree.leaves(part)
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        assert here < 0.53 * sum(leaf.nbytes for leaf in leaves)
    for _ in range(3):
        state, metrics = step(state, BATCH)
        alone_state, expected = alone(alone_state, BATCH)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    evaluated = make_eval_step(model, mesh=mesh)(state.params, BATCH)
    np.testing.assert_allclose(evaluated["loss"], alone(alone_state, BATCH)[1]["loss"], rtol=1e-5)
    # An optimizer that keeps the parameters themselves: a step cannot take their memory twice.
    step, state = make_train_step(model, optax.contrib.dog(1.0), mesh=mesh)
    assert np.isfinite(step(state, BATCH)[1]["loss"])


def message_of(call):
    try:
        call()
    except InputError as error:
        return str(error)
    raise AssertionError("no InputError")


def check_messages():
    model = FlaxXGLMForCausalLM(changed(CONFIG, num_layers=1))
    message = message_of(lambda: make_train_step(model, optax.sgd(0.1), mesh=make_mesh(4, 2)))
    assert "split evenly over 2 devices: attention_heads=5, ffn_dim=53, vocab_size=131" in message, message
    assert "3x2 needs 6 devices, but there are 8" in message_of(lambda: make_mesh(3, 2))
    other = jax.make_mesh((8,), ("x",))
    assert "the mesh has the axes ['x']" in message_of(lambda: make_train_step(model, optax.sgd(0.1), mesh=other))
    step, state = make_train_step(model, optax.sgd(0.1), mesh=make_mesh(8))
    few = {name: array[:6] for name, array in BATCH.items()}
    assert "6 rows, expected a multiple of 8" in message_of(lambda: step(state, few))


if __name__ == "__main__":
    assert jax.device_count() == 8, sys.argv
    check(changed(CONFIG, **SIZES, num_layers=1), stacked=False, steps=0)
    check(changed(CONFIG, **SIZES, num_layers=2, tie_word_embeddings=False), stacked=True, steps=2)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"))):
        check_optimizers()
    check_messages()
    print("as on one device")
