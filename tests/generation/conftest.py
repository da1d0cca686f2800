import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.models import ONE_BLOCK


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One block instead of three: tokens are chosen and caches kept in the same way, and compiled in half the time."""
    path = tmp_path_factory.mktemp("one-block")
    write_checkpoint(path, ONE_BLOCK, seed=1)
    return path
