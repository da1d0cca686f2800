"""Parameters in bfloat16 where JAX is told to promote no types by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, SAME, changed
from xglm_flax import FlaxXGLMForCausalLM, make_loss_fn

SMALL = changed(CONFIG, num_layers=1, dropout=0.0, attention_dropout=0.0)
BATCH = {"input_ids": IDS, "attention_mask": LEFT, "labels": IDS}


@pytest.fixture(scope="module")
def params():
    model = FlaxXGLMForCausalLM(SMALL)
    return model.to_bf16(model.params)


@pytest.fixture
def strictly():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.usefixtures("strictly")
@pytest.mark.slow
class TestStrictPromotion:
    def test_a_call_is_that_of_the_rounded_numbers(self, params):
        model = FlaxXGLMForCausalLM(SMALL, _do_init=False)
        logits = model(IDS, LEFT, params=params).logits
        assert logits.dtype == jnp.float32
        expected = model(IDS, LEFT, params=model.to_fp32(params)).logits
        np.testing.assert_allclose(logits, expected, **SAME)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_gradients_have_the_types_of_the_parameters(self, params, dtype):
        model = FlaxXGLMForCausalLM(SMALL, dtype=dtype, _do_init=False)
        loss, gradients = jax.value_and_grad(make_loss_fn(model))(params, BATCH)
        assert loss.dtype == jnp.float32
        assert np.isfinite(float(loss))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"bfloat16"}

    def test_texts(self, params):
        model = FlaxXGLMForCausalLM(SMALL, _do_init=False)
        options = {"max_new_tokens": 9, "stop_at_eos": False}
        expected = model.generate(IDS, params=model.to_fp32(params), **options)
        assert np.array_equal(model.generate(IDS, params=params, **options), expected)
