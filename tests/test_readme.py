"""The README's examples run as they stand."""

import re
import subprocess
import sys

import pytest

from tests.commands import ROOT
from tests.frameworks import backends_under_test

# Where a block needs a backend, it says so by what it imports.
_NEEDS = {"torch": "xglm_torch", "tf": "xglm_tf", "flax": "xglm_flax"}


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("backend", backends_under_test())
def test_examples(backend):
    first, *others = python_blocks()
    (own,) = [block for block in others if _NEEDS[backend] in block]
    run = subprocess.run([sys.executable, "-c", first + own], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # What the bundled model learned; the README shows the same sentence in the demo's style.
    assert run.stdout == (
        "['The children carry their books to school in the rain.', 'Каждое утро мы едем в школу на старом автобусе.']\n"
    )
