"""What JAX makes of a model: exported programs of any size, and what precision and outputs cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from tests.helpers.programs import equations
from xglm_flax import FlaxXGLMForCausalLM, FlaxXGLMModel

REAL = LEFT.astype(bool)


@pytest.fixture(scope="module")
def model():
    return FlaxXGLMForCausalLM(changed(CONFIG, num_layers=2))


def exported(function, *arguments):
    """A function as written down and read again."""
    return export.deserialize(export.export(jax.jit(function))(*arguments).serialize())


def shapes_of(tree):
    return jax.eval_shape(lambda: tree)


class TestExport:
    @pytest.mark.slow
    def test_of_any_batch_and_length(self, model):
        batch, length = export.symbolic_shape("batch, length")
        ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

        def call(params, ids, mask):
            return model(ids, mask, params=params, output_hidden_states=True)

        program = exported(call, shapes_of(model.params), ids, ids)
        for rows, size in ((2, 11), (1, 1), (3, 29)):
            ids = np.resize(IDS, (rows, size)).astype(np.int32)
            mask = np.ones_like(ids) if size != 11 else LEFT.astype(np.int32)
            outputs, expected = program.call(model.params, ids, mask), call(model.params, ids, mask)
            assert outputs.keys() == expected.keys() == ("logits", "past_key_values", "hidden_states")
            real = mask.astype(bool)
            np.testing.assert_allclose(outputs.logits[real], expected.logits[real], **SAME)
            for ours, theirs in zip(outputs.past_key_values, expected.past_key_values, strict=True):
                np.testing.assert_allclose(np.moveaxis(ours[1], 1, 2)[real], np.moveaxis(theirs[1], 1, 2)[real], **SAME)

    def test_of_any_batch_alone(self, model):
        (batch,) = export.symbolic_shape("batch")
        ids = jax.ShapeDtypeStruct((batch, 11), jnp.int32)
        program = exported(lambda params, ids: model(ids, params=params).logits, shapes_of(model.params), ids)
        for rows in (1, 2, 20):
            ids = np.resize(IDS, (rows, 11)).astype(np.int32)
            np.testing.assert_allclose(program.call(model.params, ids), model(ids).logits, **SAME)

    @pytest.mark.slow
    def test_of_a_loss_and_its_gradients(self, model):
        batch, length = export.symbolic_shape("batch, length")
        ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        call = jax.value_and_grad(lambda params, ids: model(ids, labels=ids, params=params).loss)
        program = exported(call, shapes_of(model.params), ids)
        for rows, size in ((2, 11), (3, 29)):
            ids = np.resize(IDS, (rows, size)).astype(np.int32)
            ours, expected = program.call(model.params, ids), call(model.params, ids)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), ours, expected)

    def test_of_the_bare_linen_module(self):
        model = FlaxXGLMModel(changed(CONFIG, num_layers=1))
        batch, length = export.symbolic_shape("batch, length")
        ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        program = exported(
            lambda params, ids: model.module.apply({"params": params}, ids), shapes_of(model.params), ids
        )
        outputs = program.call(model.params, IDS.astype(np.int32))
        np.testing.assert_allclose(outputs.last_hidden_state, model(IDS).last_hidden_state, **SAME)

    def test_of_a_step_with_a_cache(self, model):
        (batch,) = export.symbolic_shape("batch")
        token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

        def step(params, token, cache):
            return model(token, params=params, past_key_values=cache)

        cache = jax.eval_shape(lambda: model.init_cache(2, 16))
        cache = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:])[: leaf.ndim], leaf.dtype), cache
        )
        program, cache = exported(step, shapes_of(model.params), token, cache), model.init_cache(2, 16)
        for index in range(3):
            outputs = program.call(model.params, IDS[:, index : index + 1].astype(np.int32), cache)
            cache = outputs.past_key_values
        assert cache.fixed
        assert int(cache.length) == 3
        np.testing.assert_allclose(outputs.logits[:, 0], model(IDS[:, :3]).logits[:, 2], **SAME)


def precisions(function, *arguments):
    """The precision of each product of a program."""
    found = equations(function, *arguments)
    return {equation.params["precision"] for equation in found if equation.primitive.name == "dot_general"}


class TestPrecision:
    @pytest.mark.parametrize("labels", [None, IDS], ids=["logits", "loss"])
    def test_is_the_highest_unless_a_user_says_otherwise(self, model, labels):
        def call(params):
            outputs = model(IDS, params=params, labels=labels, return_logits=labels is None)
            return outputs.logits.sum() if labels is None else outputs.loss

        highest = jax.lax.Precision.HIGHEST
        assert precisions(jax.grad(call), model.params) == {(highest, highest)}
        with jax.default_matmul_precision("tensorfloat32"):
            assert (highest, highest) not in precisions(jax.grad(call), model.params)
        assert precisions(jax.grad(call), model.params) == {(highest, highest)}


def test_a_cache_that_is_not_returned_costs_nothing(model):
    def program(**options):
        call = jax.jit(lambda params, ids: model(ids, params=params, **options).logits)
        compiled = call.lower(model.params, IDS).compile()
        memory = compiled.memory_analysis()
        return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes, memory.output_size_in_bytes

    assert program() == program(use_cache=False)
