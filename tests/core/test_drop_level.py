"""How often numbers are dropped, and that the rest makes up for it."""

import pytest

from xglm_core.dropout import drop_level


class TestDropLevel:
    @pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 0.2, 0.5, 0.9, 0.99999, 0.9999999])
    def test_mean_stays_and_rate_is_near(self, rate):
        level, factor = drop_level(rate)
        assert abs(level / 2**16 - rate) <= 2**-16
        assert (2**16 - level) * factor == 2**16

    def test_rates_of_zero_and_one(self):
        assert drop_level(0.0) == (0, 1.0)
        assert drop_level(1.0) == (2**16, 0.0)
