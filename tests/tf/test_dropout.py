"""Dropout of the TensorFlow models."""

import numpy as np
import pytest
import tensorflow as tf

from xglm_tf.dropout import TFXGLMDropout


def dropped(states, rate, training=True):
    return TFXGLMDropout(rate, seed=0, dtype=states.dtype)(states, training=training)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_how_many_and_by_what(dtype, rate):
    result = dropped(tf.ones((7, 11, 1009), dtype), rate)
    assert result.dtype == dtype
    result = tf.cast(result, tf.float32).numpy()
    kept = result != 0
    # 77,693 draws: the share has a standard deviation of at most 0.0018.
    assert abs(kept.mean() - (1 - rate)) < 0.01
    np.testing.assert_allclose(result[kept], 1 / (1 - rate), rtol=1e-2)


def test_neighbours_are_independent():
    """One number decides for two."""
    kept = dropped(tf.ones(40000), 0.5).numpy() != 0
    # The mean of 20,000 products of two fair coins has a standard deviation of 0.0031.
    for distance in (1, 2):
        assert abs((kept[:-distance:2] & kept[distance::2]).mean() - 0.25) < 0.02


def test_gradient_has_the_same_mask():
    states = tf.random.stateless_normal((5, 13), (0, 1))
    with tf.GradientTape() as tape:
        tape.watch(states)
        result = dropped(states, 0.3)
    np.testing.assert_allclose(tape.gradient(result, states) * states, result, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_each_call_has_a_mask_of_its_own(jit):
    layer = TFXGLMDropout(0.5, seed=0)
    run = tf.function(lambda states: layer(states, training=True), jit_compile=jit, reduce_retracing=True)
    first, second = (run(tf.ones((7, 11))).numpy() for _ in range(2))
    assert (first != second).any()


def test_ends():
    states = tf.random.stateless_normal((3, 17), (0, 1))
    assert dropped(states, 0.0) is states
    assert dropped(states, 0.9, training=False) is states
    assert not dropped(states, 1.0).numpy().any()
