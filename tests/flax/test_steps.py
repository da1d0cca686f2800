"""Steps of training in JAX: texts that are too long, optimizers that want more than gradients, states of others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from xglm_core.errors import InputError
from xglm_core.loss import labels_for
from xglm_flax import FlaxXGLMForCausalLM, make_eval_step, make_loss_fn, make_mesh, make_train_step

MASK = LEFT[:, ::-1]
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": labels_for(IDS, MASK)}
LIMIT = CONFIG.max_position_embeddings
LONG = np.resize(IDS, (2, LIMIT + 1))


@pytest.fixture(scope="module")
def model():
    return FlaxXGLMForCausalLM(changed(CONFIG, dropout=0.0, attention_dropout=0.0, num_layers=1))


@pytest.fixture(scope="module")
def differentiated(model):
    return jax.jit(jax.value_and_grad(make_loss_fn(model)))


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), ours, theirs)


PAST = {
    "no mask": {"input_ids": LONG, "labels": LONG},
    "a mask of ones": {"input_ids": LONG, "labels": LONG, "attention_mask": np.ones_like(LONG)},
    "position_ids": {**BATCH, "position_ids": np.arange(51, 62)[None]},
    "arrays on the device": jax.tree.map(jnp.asarray, {"input_ids": LONG, "labels": LONG, "attention_mask": LONG}),
}


class TestTextsPastTheLimit:
    @pytest.mark.parametrize("batch", PAST.values(), ids=PAST)
    def test_are_an_error_before_the_step(self, model, batch):
        step, state = make_train_step(model, optax.sgd(0.1))
        for call in (step, make_eval_step(model), lambda state, batch: make_loss_fn(model)(model.params, batch)):
            with pytest.raises(InputError, match=r"position 61 is past the limit of 61 tokens; shorten the text"):
                call(state, batch)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))

    def test_negative_positions_are_an_error(self, model):
        step, state = make_train_step(model, optax.sgd(0.1))
        with pytest.raises(InputError, match="position_ids hold -1"):
            step(state, {**BATCH, "position_ids": np.arange(-1, 10)[None]})

    def test_padding_does_not_count(self, model):
        mask = np.ones_like(LONG)
        mask[:, -1] = 0
        step, state = make_train_step(model, optax.sgd(0.1))
        _, metrics = step(state, {"input_ids": LONG, "labels": labels_for(LONG, mask), "attention_mask": mask})
        assert np.isfinite(metrics["loss"])

    def test_one_row_of_positions_serves_all_parts(self, model):
        positions = np.arange(11)[None] + 3
        step, state = make_train_step(model, optax.sgd(0.1))
        parts, other = make_train_step(model, optax.sgd(0.1), accumulation_steps=2)
        state, _ = step(state, {**BATCH, "position_ids": positions.repeat(2, axis=0)})
        other, _ = parts(other, {**BATCH, "position_ids": positions})
        assert_same(other.params, state.params)


@pytest.mark.slow
class TestOptimizers:
    def test_polyak_sgd_wants_the_loss(self, model, differentiated):
        """Its step is loss / |gradient|^2, at most the rate."""
        step, state = make_train_step(model, optax.polyak_sgd(1.0))
        state, metrics = step(state, BATCH)
        loss, gradients = differentiated(model.params, BATCH)
        rate = min(1, float(loss) / float(metrics["gradient_norm"]) ** 2)
        assert_same(state.params, jax.tree.map(lambda leaf, slope: leaf - rate * slope, model.params, gradients))

    def test_a_search_along_a_line_wants_the_loss_elsewhere(self, model, differentiated):
        """And its slope there, of the whole batch, as `optax.lbfgs` does; this one only notes what it was given."""

        def update(updates, state, params, *, value, grad, value_fn):
            noted = {"value": value, "grad": grad, "elsewhere": jax.value_and_grad(value_fn)(half(params))}
            return jax.tree.map(jnp.zeros_like, updates), noted

        def half(params):
            return jax.tree.map(lambda leaf: leaf / 2, params)

        def init(params):
            return {"value": jnp.zeros(()), "grad": params, "elsewhere": (jnp.zeros(()), params)}

        optimizer = optax.GradientTransformationExtraArgs(init, update)
        step, state = make_train_step(model, optimizer, accumulation_steps=2)
        state, _ = step(state, BATCH)
        noted = state.opt_state
        assert_same((noted["value"], noted["grad"]), differentiated(model.params, BATCH))
        assert_same(noted["elsewhere"], differentiated(half(model.params), BATCH))

    def test_reduce_on_plateau_wants_the_loss(self, model):
        optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
        step, state = make_train_step(model, optimizer)
        state, metrics = step(state, BATCH)
        assert float(state.opt_state[1].best_value) == float(metrics["loss"])

    def test_dog_keeps_the_first_parameters(self, model, differentiated):
        """Which it shares with the state: a step would take their memory twice."""
        optimizer = optax.contrib.dog(1.0)
        step, state = make_train_step(model, optimizer)
        params, kept = model.params, optimizer.init(model.params)
        for _ in range(2):
            state, _ = step(state, BATCH)
            updates, kept = optimizer.update(differentiated(params, BATCH)[1], kept, params)
            params = optax.apply_updates(params, updates)
        assert_same(state.params, params)

    def test_adafactor_on_a_mesh_of_one_device(self, model):
        """The second moments of a matrix are those of its rows and columns, in its place but not in its shape."""
        optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=8)
        step, state = make_train_step(model, optimizer, mesh=make_mesh(1))
        alone, other = make_train_step(model, optimizer)
        for _ in range(2):
            state, metrics = step(state, BATCH)
            other, expected = alone(other, BATCH)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


class TestStatesOfOtherSteps:
    def test_go_on_with_the_optimizer_of_the_step(self, model, differentiated):
        _, state = make_train_step(model, optax.sgd(0.1))
        step, _ = make_train_step(model, optax.sgd(0.5))
        state, _ = step(state, BATCH)
        _, gradients = differentiated(model.params, BATCH)
        assert_same(state.params, jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, model.params, gradients))
        step(state, BATCH)

    def test_are_an_error_if_the_optimizer_keeps_something_else(self, model):
        _, state = make_train_step(model, optax.adam(0.1))
        step, _ = make_train_step(model, optax.sgd(0.5))
        with pytest.raises(InputError, match="the state is of another optimizer, which keeps something else"):
            step(state, BATCH)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
