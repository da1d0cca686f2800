import os
import tempfile

import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.frameworks import Framework, backends_under_test
from tests.helpers.models import CONFIG, CROSS_CONFIG
from xglm_core.backends import require_frameworks
from xglm_core.errors import BackendError

_COMPILED = tempfile.TemporaryDirectory(prefix="xglm-tests-")


def pytest_configure():
    """A backend that was asked for and cannot be imported is an error: its tests must not vanish in silence."""
    # Many tests, and the commands that some of them run, have JAX compile the same small model.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    for name in backends_under_test():
        try:
            require_frameworks(name)
        except BackendError as error:
            raise pytest.UsageError(f"{error} (or leave {name} out of XGLM_TEST_BACKENDS)") from None


def pytest_unconfigure():
    """Removes what JAX has compiled."""
    _COMPILED.cleanup()


@pytest.fixture(scope="module", params=backends_under_test())
def fw(request):
    return Framework(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, CONFIG, seed=1)
    return path


@pytest.fixture(scope="module")
def model(fw, folder):
    return fw.causal_lm.from_pretrained(folder)


@pytest.fixture(scope="module")
def cross_model(fw, tmp_path_factory):
    path = tmp_path_factory.mktemp("cross")
    write_checkpoint(path, CROSS_CONFIG, seed=1)
    return fw.causal_lm.from_pretrained(path)


@pytest.fixture
def load(fw, tmp_path):
    """Makes the causal language model of a configuration, with the random weights of the other fixtures."""

    def load(config):
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        write_checkpoint(folder, config, seed=1)
        return fw.causal_lm.from_pretrained(folder)

    return load
