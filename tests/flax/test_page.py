"""The examples of docs/flax.md run as they stand."""

import re
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT


@pytest.mark.slow
def test_examples_of_the_flax_page():
    text = (ROOT / "docs" / "flax.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 7
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
