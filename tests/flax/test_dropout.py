"""Dropout of the Flax models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xglm_flax.fast.dropout import FlaxXGLMDropout


def dropped(states, rate, deterministic=False):
    return FlaxXGLMDropout(rate).apply({}, states, deterministic, rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_how_many_and_by_what(dtype, rate):
    result = dropped(jnp.ones((7, 11, 1009), dtype), rate)
    assert result.dtype == dtype
    kept = np.asarray(result != 0)
    # 77,693 draws: the share has a standard deviation of at most 0.0018.
    assert abs(kept.mean() - (1 - rate)) < 0.01
    np.testing.assert_allclose(np.asarray(result, np.float32)[kept], 1 / (1 - rate), rtol=1e-2)


def test_halves_are_independent():
    """One number decides for one of the first half and one of the second."""
    kept = np.asarray(dropped(jnp.ones(40000), 0.5) != 0).reshape(2, -1)
    # The mean of 20,000 products of two fair coins has a standard deviation of 0.0031.
    assert abs((kept[0] & kept[1]).mean() - 0.25) < 0.02
    assert abs((kept[0, 1:] & kept[0, :-1]).mean() - 0.25) < 0.02


def test_gradient_has_the_same_mask():
    states = jax.random.normal(jax.random.key(1), (5, 13))
    np.testing.assert_allclose(jax.grad(lambda s: dropped(s, 0.3).sum())(states) * states, dropped(states, 0.3))


def test_rates_of_zero_and_one():
    states = jax.random.normal(jax.random.key(1), (3, 17))
    assert dropped(states, 0.0) is states
    assert dropped(states, 0.9, deterministic=True) is states
    assert not dropped(states, 1.0).any()
