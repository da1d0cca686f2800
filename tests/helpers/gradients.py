"""How close losses and gradients are to those that are computed in float64."""

import numpy as np

# float32 rounds at 6e-8 of a number. A loss is a mean of some 20 logarithms of order 5: 3e-7 at worst, measured.
LOSS = 1e-6

# Relative to the largest entry of a weight's gradient, which is a sum over all tokens and back through three blocks.
# Measured: 3e-6 at worst. A mistake, such as a factor of the embedding forgotten or a token counted twice, is 1e-2.
GRADIENT = 2e-5


def assert_gradients_equal(ours, expected):
    assert ours.keys() <= expected.keys()
    for name, gradient in ours.items():
        # A key bias has no gradient but what rounding leaves, so its scale is that of the weight beside it.
        scale = np.abs(expected[name.replace("k_proj.bias", "k_proj.weight")]).max()
        assert gradient.shape == expected[name].shape
        assert np.abs(gradient - expected[name]).max() < GRADIENT * scale, name
