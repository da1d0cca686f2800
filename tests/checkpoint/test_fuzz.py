import pytest

from tests.checkpoint.fuzz import KINDS, fuzz


@pytest.mark.parametrize("name", KINDS)
def test_random_changes(name, tmp_path):
    """`make fuzz` runs 20,000 cases."""
    counts, slowest = fuzz(name, tmp_path / "file", 150, seed=3)
    # A fuzzer whose every file is rejected, or loads, tests little.
    assert counts["loaded"] > 10
    assert counts["rejected"] > 50
    assert slowest < 10  # Seconds. They take milliseconds, on a machine that does nothing else.
