"""Flags of JAX that users set: 64-bit types, and promotion of types or ranks as an error."""

import json
import os
import subprocess
import sys

import pytest

from conformance.random_weights import write_checkpoint
from tests.flax import run_under_flags
from tests.helpers.commands import ROOT
from xglm_flax import FlaxXGLMForCausalLM


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The checkpoint, and what it generates without flags."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, run_under_flags.SMALL, seed=1)
    model = FlaxXGLMForCausalLM.from_pretrained(folder)
    return folder, {name: run_under_flags.continued(model, name) for name in run_under_flags.CHOICES}


@pytest.mark.parametrize(
    "flags",
    [
        {"JAX_ENABLE_X64": "1"},
        {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    ],
    ids=["x64", "no promotion"],
)
@pytest.mark.slow
def test_numbers_and_types_are_the_same(expected, flags):
    folder, texts = expected
    run = subprocess.run(
        [sys.executable, "-m", "tests.flax.run_under_flags", str(folder), json.dumps(texts)],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            **flags,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "as without" in run.stdout
