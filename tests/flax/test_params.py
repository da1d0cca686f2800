"""The parameters of a Flax model, beside it: trees that do not fit, and what transformers' class says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.helpers.models import CONFIG, IDS, SAME, changed
from xglm_core.errors import InputError
from xglm_flax import FlaxXGLMForCausalLM, FlaxXGLMModel, make_train_step, stack_layers


@pytest.fixture(scope="module")
def model(folder):
    return FlaxXGLMForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def scanned(folder):
    return FlaxXGLMForCausalLM.from_pretrained(folder, scan_layers=True)


def with_leaf(params, path, leaf=None):
    """The tree with another leaf, or without it."""
    flat = {**flatten_dict(params, sep="/"), path: leaf}
    return unflatten_dict({name: value for name, value in flat.items() if value is not None}, sep="/")


KERNEL, BIAS = "model/layers/1/fc1/kernel", "model/layers/2/fc1/bias"
STACKED = "model/layers/fc1/kernel"
MISFITS = {
    "nothing": (lambda params: {}, r"51 missing: model/embed_tokens/embedding, .*, \.\.\."),
    "a leaf too few": (lambda params: with_leaf(params, BIAS), rf"1 missing: {BIAS}"),
    "a leaf too many": (
        lambda params: with_leaf(params, "lm_head/kernel", np.ones(3)),
        "1 unexpected: lm_head/kernel",
    ),
    "another shape": (
        lambda params: with_leaf(params, KERNEL, np.ones((53, 35))),
        rf"1 of another shape: {KERNEL} \(\[53, 35\], expected \[35, 53\]\)",
    ),
    "all at once": (
        lambda params: with_leaf(with_leaf(with_leaf(params, BIAS), "x/y", np.ones(2)), KERNEL, np.ones(2)),
        rf"1 missing: {BIAS}; 1 unexpected: x/y; 1 of another shape: {KERNEL} \(\[2\], expected \[35, 53\]\)",
    ),
    "the bare decoder's": (lambda params: params["model"], "51 missing: .*; 51 unexpected: .*"),
    "stacked": (
        lambda params: with_leaf(stack_layers(params), STACKED, np.ones((2, 35, 53))),
        rf"1 of another shape: {STACKED} \(\[2, 35, 53\], expected \[3, 35, 53\]\)",
    ),
    "no tree": (lambda params: [1], "params is a list, expected a tree of parameters"),
}


@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS)
class TestTreesThatDoNotFit:
    def test_are_an_error_when_set(self, model, make, message):
        before = model.params
        with pytest.raises(InputError, match=message):
            model.params = make(model.params)
        assert model.params is before

    def test_are_an_error_when_passed(self, model, make, message, tmp_path):
        params = make(model.params)
        calls = [
            lambda: model.generate(IDS, params=params),
            lambda: model.score(IDS, params=params),
            lambda: model.save_pretrained(tmp_path, params=params),
            lambda: make_train_step(model, optax.sgd(0.1), params=params),
        ]
        if "unexpected: lm_head" not in message:  # Which a call does not look at.
            calls += [
                lambda: model(IDS, params=params),
                lambda: jax.jit(lambda params: model(IDS, params=params).logits)(params),
            ]
        for call in calls:
            with pytest.raises(InputError, match=message):
                call()


class TestTreesThatFit:
    def test_frozen_or_stacked(self, model, scanned):
        expected = model(IDS).logits
        other = FlaxXGLMForCausalLM(CONFIG, _do_init=False)
        other.params = freeze(model.params)
        assert type(other.params["model"]["layers"]) is dict
        np.testing.assert_array_equal(other(IDS).logits, expected)
        np.testing.assert_array_equal(model(IDS, params=freeze(model.params)).logits, expected)
        np.testing.assert_array_equal(model.generate(IDS, params=freeze(model.params), max_new_tokens=2)[:, :11], IDS)
        for params in (freeze(stack_layers(model.params)), stack_layers(model.params), model.params):
            scanned.params = params
            np.testing.assert_allclose(scanned(IDS).logits, expected, **SAME)

    def test_shapes_in_place_of_arrays(self, model):
        other = FlaxXGLMForCausalLM(CONFIG, _do_init=False)
        other.params = jax.eval_shape(lambda: model.params)
        assert jax.eval_shape(other, IDS).logits.shape == (2, 11, 131)

    def test_mean_of_two_models(self, model):
        """What a user computes from trees is a tree."""
        again = FlaxXGLMForCausalLM(CONFIG, _do_init=False)
        again.params = jax.tree.map(lambda a, b: (a + b) / 2, model.params, model.params)
        np.testing.assert_allclose(again(IDS).logits, model(IDS).logits, **SAME)


class TestAsInTransformers:
    def test_loaded_without_init_they_are_returned_beside_the_model(self, folder, model):
        other, params = FlaxXGLMForCausalLM.from_pretrained(folder, jnp.bfloat16, _do_init=False)
        assert other.params is None
        assert other.dtype == jnp.bfloat16
        jax.tree.map(np.testing.assert_array_equal, params, model.params)
        assert {device.platform for leaf in jax.tree.leaves(params) for device in leaf.devices()} == {"cpu"}
        assert other(IDS, params=params).logits.dtype == jnp.bfloat16

    @pytest.mark.parametrize("kind", [FlaxXGLMForCausalLM, FlaxXGLMModel])
    def test_names_and_shapes(self, kind):
        model = kind(changed(CONFIG, num_layers=1), (1, 7), seed=3, _do_init=False, param_dtype="bfloat16")
        params = model.init_weights(model.key, model.input_shape)
        assert model.framework == "flax"
        assert model.required_params == set(flatten_dict(params))
        assert model.params_shape_tree == jax.eval_shape(lambda: params)
        jax.tree.map(np.testing.assert_array_equal, params, kind(model.config, seed=3, param_dtype="bfloat16").params)

    def test_frozen_trees_are_cast_and_completed(self, model):
        frozen = freeze(model.params)
        mask = unflatten_dict({path: path[-1] == "kernel" for path in flatten_dict(model.params)})
        cast = flatten_dict(model.to_bf16(frozen, mask))
        assert {(path[-1] == "kernel", leaf.dtype.name) for path, leaf in cast.items()} == {
            (True, "bfloat16"),
            (False, "float32"),
        }
        some = freeze(with_leaf(model.params, BIAS))
        whole = model.init_weights(jax.random.key(0), (1, 1), some)
        assert set(flatten_dict(whole)) == model.required_params
