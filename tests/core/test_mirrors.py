"""The backends mirror each other: the same public functions and classes in the same order, or a reason why not."""

import ast
import re

import pytest

from tests.helpers.commands import ROOT

FILES = (
    "attention", "cache", "blocks", "decoder", "causal_lm", "generation", "scoring", "inputs", "loss", "selection",
)  # fmt: skip
BACKENDS = ("torch", "tf", "flax")
COUNTERPART = re.compile(
    r"Differs[^:]*:.*(PyTorch|TensorFlow|TF|xglm_tf|Keras|JAX|Flax|XLA|others|other backends)", re.DOTALL
)


def public_names(backend, name):
    """The public functions and classes of a file without the backend's prefix, and whether each says how it differs."""
    text = (ROOT / f"xglm_{backend}" / f"{name}.py").read_text()
    lines = text.splitlines()
    names = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            above = first
            while lines[above - 1].startswith("#"):
                above -= 1
            reason = "\n".join([*lines[above:first], ast.get_docstring(node) or ""])
            names[re.sub("^(TF|Flax|Torch)", "", node.name)] = bool(COUNTERPART.search(reason))
    return names


@pytest.mark.parametrize("name", FILES)
def test_the_same_functions_in_the_same_order(name):
    files = {backend: public_names(backend, name) for backend in BACKENDS}
    common = set.intersection(*map(set, files.values()))
    explained = {item for names in files.values() for item, differs in names.items() if differs}
    unexplained = {item for names in files.values() for item in names if item not in common | explained}
    assert not unexplained, f"{name}.py: only in some backends, and no comment `Differs: ...` names the counterpart"
    orders = {backend: [item for item in names if item in common] for backend, names in files.items()}
    assert orders["tf"] == orders["torch"]
    assert orders["flax"] == orders["torch"]
