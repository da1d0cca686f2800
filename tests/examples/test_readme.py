"""The README's examples run as they stand."""

import ast
import re
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.frameworks import backends_under_test

# Where a block needs a backend, it says so by what it imports.
_NEEDS = {"torch": "xglm_torch", "tf": "xglm_tf", "flax": "xglm_flax"}


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "backend",
    # The examples of one backend are as those of the next, but for names.
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "torch")) for name in backends_under_test()],
)
def test_examples_of_the_readme(backend):
    first, *others = python_blocks()
    (own,) = [block for block in others if _NEEDS[backend] in block]
    shared = [block for block in others if not any(package in block for package in _NEEDS.values())]
    code = "".join([first, own, *shared])
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    generated, *scores = run.stdout.splitlines()
    texts = ast.literal_eval(generated)
    corpus = ROOT / "examples" / "tiny_model" / "corpus"
    for text, prompt, language in zip(texts, ("The children", "Каждое утро"), ("en", "ru"), strict=True):
        assert text.startswith(prompt)
        assert text in (corpus / f"{language}.txt").read_text(encoding="utf-8").splitlines()
    for line, text in zip(scores, ("The children", "Каждое утро"), strict=True):
        perplexity, words = line.removeprefix(f"{text} ").split(" ", 1)
        assert 1 < float(perplexity) < 10  # The first words of sentences that it has learned.
        assert [word for word, _ in ast.literal_eval(words)] == text.split()
