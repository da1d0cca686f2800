import math

import numpy as np
import pytest

from tests.helpers.checkpoint_files import library
from xglm_core import XGLMConfig
from xglm_core.positions import position_table

SIZES = [(1024, 16), (2048, 16), (4096, 32), (35, 5), (4, 1)]


def config_of(width, heads=1, **kwargs):
    return XGLMConfig(d_model=width, attention_heads=heads, **kwargs)


def round32(number):
    """The float32 next to a Python float, as a Python float."""
    return float(np.float32(number))


def entry(position, column, width):
    """One entry by Python's own `math`, with each step rounded to float32 as the published model does."""
    half = width // 2
    step = round32(-math.log(10000) / (half - 1))
    frequency = round32(math.exp(round32((column % half) * step)))
    angle = round32((position + 2) * frequency)
    return round32((math.sin if column < half else math.cos)(angle))


class TestValues:
    @pytest.mark.parametrize(("width", "heads"), SIZES)
    def test_selected_entries(self, width, heads):
        table = position_table(config_of(width, heads))
        half = width // 2
        columns = sorted({0, 1, half // 3, half - 1, half, half + 1, half + half // 3, 2 * half - 1})
        for position in (0, 1, 2, 17, 1000, 2046, 2047):
            for column in columns:
                # One unit in the last place of a number below 1: `math` and numpy may differ in their last bit, which
                # seldom moves the rounding to float32.
                assert abs(table[position + 2, column] - entry(position, column, width)) <= 2**-24, (position, column)

    def test_first_and_last_frequency(self):
        table = position_table(config_of(1024, 16))
        # The highest frequency is 1, the lowest 1/10000, where float32 tells the sine from its angle by 2e-8 at most.
        assert table[7, 0] == np.float32(math.sin(7))
        assert table[7, 512] == np.float32(math.cos(7))
        assert table[7, 511] == pytest.approx(7e-4, rel=1e-6)
        assert table[7, 1023] == pytest.approx(math.cos(7e-4), rel=1e-6)

    @pytest.mark.parametrize(
        ("width", "heads", "expected"), [(1024, 16, 1.5e-4), (2048, 16, 1.6e-4), (4096, 32, 1.4e-4)]
    )
    def test_float64_is_another_table(self, width, heads, expected):
        """Why the arithmetic is float32; the largest of these figures is the documented one."""
        half = width // 2
        angles = np.arange(2050)[:, None] * np.exp(np.arange(half) * (-math.log(10000) / (half - 1)))
        exact = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        exact[1] = 0
        assert np.abs(position_table(config_of(width, heads)) - exact).max() == pytest.approx(expected, abs=0.05e-4)

    @pytest.mark.parametrize(("width", "heads"), SIZES)
    def test_sine_and_cosine_have_one_angle(self, width, heads):
        table = position_table(config_of(width, heads)).astype(np.float64)
        half = width // 2
        squares = np.delete(table[:, :half] ** 2 + table[:, half : 2 * half] ** 2, 1, axis=0)
        # Each of the two is rounded by at most 2^-25, and counts at most twice in the square.
        np.testing.assert_allclose(squares, 1, rtol=0, atol=2**-23)

    def test_lowest_frequency_is_monotone(self):
        """Its angle stays below 0.21, so over all positions the sine rises and the cosine falls."""
        table = position_table(config_of(1024, 16))
        assert (np.diff(table[2:, 511]) > 0).all()
        assert (np.diff(table[2:, 1023]) <= 0).all()
        assert table[2049, 511] == pytest.approx(math.sin(0.2049), rel=1e-6)

    def test_rows_differ(self):
        table = position_table(config_of(1024, 16))
        assert len(np.unique(table, axis=0)) == 2050


class TestShape:
    @pytest.mark.parametrize(("width", "heads"), SIZES)
    def test_rows_and_type(self, width, heads):
        table = position_table(config_of(width, heads, max_position_embeddings=61))
        assert table.shape == (63, width)
        assert table.dtype == np.float32

    def test_odd_width_ends_with_zeros(self):
        table = position_table(config_of(35, 5, max_position_embeddings=61))
        assert (table[:, 34] == 0).all()
        assert table[5, 33] == np.float32(math.cos(np.float32(5 * np.float32(1e-4))))
        np.testing.assert_array_equal(table[:, :34], position_table(config_of(34, 2, max_position_embeddings=61)))

    def test_longer_table_begins_with_the_shorter(self):
        short = position_table(config_of(64, max_position_embeddings=10))
        long = position_table(config_of(64, max_position_embeddings=5000))
        np.testing.assert_array_equal(long[:12], short)
        assert abs(long[5001, 0] - math.sin(5001)) <= 2**-24


class TestPaddingRow:
    @pytest.mark.parametrize("pad", [0, 1, 5, 62])
    def test_is_zero(self, pad):
        table = position_table(config_of(36, max_position_embeddings=61, pad_token_id=pad))
        assert np.flatnonzero(~table.any(axis=1)).tolist() == [pad]

    @pytest.mark.parametrize("pad", [None, 63, 1000])
    def test_none(self, pad):
        table = position_table(config_of(36, max_position_embeddings=61, pad_token_id=pad))
        assert table.any(axis=1).all()

    def test_other_rows_do_not_depend_on_it(self):
        with_pad, without = (position_table(config_of(36, pad_token_id=pad)) for pad in (1, None))
        np.testing.assert_array_equal(with_pad[2:], without[2:])


class TestAgainstTorch:
    """What the module's text says about PyTorch, in which the published models were trained."""

    @pytest.mark.parametrize(("width", "heads"), SIZES[:3])
    def test_only_frequencies_differ(self, width, heads):
        torch = library("torch")
        half = width // 2
        table = position_table(config_of(width, heads))
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
        angles = torch.arange(2050, dtype=torch.float32)[:, None] * frequencies
        theirs = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1).numpy()
        theirs[1] = 0

        # A row of arguments to `exp` again, to see where the two round differently.
        exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1))
        ours = np.array([math.exp(exponent) for exponent in exponents.tolist()], dtype=np.float32)
        units = np.abs(ours.view(np.int32) - frequencies.numpy().view(np.int32))
        assert units.max() <= 1
        assert (units > 0).mean() < 0.02

        difference = np.abs(theirs - table).reshape(2050, 2, half)
        # Where the frequencies agree, so do the angles; sines differ by a unit in the last place of numbers below 1.
        assert difference[:, :, units == 0].max() <= 2**-24
        # Elsewhere the angle is off by 2049 x 2^-24 at most, and moves by as much again when it is rounded.
        assert difference.max() <= 2 * 2049 * 2**-24
