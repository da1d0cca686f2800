import functools
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xglm_core.loss
from conformance.random_weights import write_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.frameworks import Framework, backends_under_test
from tests.helpers.models import CONFIG, CROSS_CONFIG, ENCODER, IDS, SAME
from xglm_core.backends import require_frameworks
from xglm_core.errors import BackendError
from xglm_core.loss import chunk_positions

_COMPILED = tempfile.TemporaryDirectory(prefix="xglm-tests-")


def pytest_configure():
    """A backend that was asked for and cannot be imported is an error: its tests must not vanish in silence."""
    # Many tests, and the commands that some of them run, have JAX compile the same small model.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # Machine code that is not optimized takes a third less time in all; XLA's own programs are the same.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
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


@pytest.fixture(scope="module", autouse=True)
def _forget_programs(request):
    """Frees what a module of JAX has compiled, which no other one needs: it would be gigabytes in the end."""
    yield
    if request.module.__name__.startswith("tests.flax."):
        importlib.import_module("jax").clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, CONFIG, seed=1)
    return path


@pytest.fixture(scope="session")
def cross_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cross")
    write_checkpoint(path, CROSS_CONFIG, seed=1)
    return path


@functools.cache
def _loaded(name: str, folder: Path) -> Any:
    """A model that all modules share: what it has compiled for one of them need not be compiled for the next."""
    return Framework(name).causal_lm.from_pretrained(folder)


def _unchanged(fw: Framework, folder: Path, **inputs: Any) -> Iterator[Any]:
    """The shared model of a folder; an error after the module whose tests have changed it."""
    model = _loaded(fw.name, folder)

    def state() -> tuple[Any, np.ndarray]:
        return (model.config.to_dict(), model.generation_config, model.loss_options), fw.logits(model, IDS, **inputs)

    options, logits = state()
    yield model
    said = "a test of this module has changed the model that all share: let it `load` its own"
    assert state()[0] == options, said
    np.testing.assert_allclose(state()[1], logits, **SAME, err_msg=said)


@pytest.fixture(scope="module")
def model(fw, folder):
    yield from _unchanged(fw, folder)


@pytest.fixture(scope="module")
def tiny_model(fw):
    """The bundled one."""
    yield from _unchanged(fw, ROOT / "examples" / "tiny_model" / "checkpoint")


@pytest.fixture(scope="module")
def cross_model(fw, cross_folder):
    yield from _unchanged(fw, cross_folder, encoder_hidden_states=ENCODER)


@pytest.fixture
def chunk_of(monkeypatch):
    """Sets how many positions have logits at a time in the loss, in place of those that 2**28 bytes hold."""

    def chunk_of(positions, vocab_size=CONFIG.vocab_size):
        monkeypatch.setattr(xglm_core.loss, "LOGITS_BYTES", positions * 4 * vocab_size)
        assert positions - 32 < chunk_positions(vocab_size) <= positions  # Rounded down, where there are so many.

    return chunk_of


@pytest.fixture
def load(fw, tmp_path):
    """Makes the causal language model of a configuration, with the random weights of the other fixtures."""

    def load(config):
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        write_checkpoint(folder, config, seed=1)
        return fw.causal_lm.from_pretrained(folder)

    return load
