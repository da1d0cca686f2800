"""The examples of docs/training.md run as they stand."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.frameworks import backends_under_test

SECTIONS = {"torch": "PyTorch", "tf": "Keras", "flax": "JAX"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", backends_under_test())
def test_examples_of_the_training_page(backend, tmp_path):
    shared, *sections = re.split(
        r"^## ", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    (own,) = [section for section in sections if section.startswith(f"{SECTIONS[backend]}\n")]
    blocks = re.findall(r"```python\n(.*?)```", shared + own, re.DOTALL)
    assert len(blocks) >= 2
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
