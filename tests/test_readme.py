"""The README's examples run as they stand."""

import ast
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
    texts = ast.literal_eval(run.stdout)
    corpus = ROOT / "examples" / "tiny_model" / "corpus"
    for text, prompt, language in zip(texts, ("The children", "Каждое утро"), ("en", "ru"), strict=True):
        assert text.startswith(prompt)
        assert text in (corpus / f"{language}.txt").read_text(encoding="utf-8").splitlines()
