"""A pytest plugin: transformers' common tests meet our classes, and the results meet the list of what is expected.

None of transformers' test code is kept here: `python -m conformance.hf_suite` fetches its source distribution, whose
common tests (`tests/test_*_common.py`) become the package `hf_tests`. What they need and the distribution lacks is
stood in for below.
"""

from __future__ import annotations

import importlib
import sys
import tomllib
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

PARTS = Path(__file__).parent
LISTS = PARTS / "expected"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options that `conformance.hf_suite` passes."""
    parser.addoption("--hf-tests", required=True, help="the folder with the package `hf_tests`")
    parser.addoption("--hf-part", required=True, help="which part of the suite runs, as its list is called")
    parser.addoption("--hf-theirs", action="store_true", help="leave transformers' own classes in place")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the tests importable and puts our classes in the place of transformers'."""
    _make_importable(Path(config.getoption("--hf-tests")))
    if not config.getoption("--hf-theirs"):
        _replace(config.getoption("--hf-part"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Has each test do what the list of the part says: pass, or fail for a reason.

    Raises:
        pytest.UsageError: the classes under test are not those that were asked for, or the list does not fit the tests,
            or too few of them are to pass.
    """
    part, theirs = config.getoption("--hf-part"), config.getoption("--hf-theirs")
    _check_classes(part, theirs=theirs)
    listed = tomllib.loads((LISTS / f"{part}.toml").read_text(encoding="utf-8"))
    passes, differs, not_theirs = set(listed["passes"]), listed["differs"], set(listed["not_theirs"])
    found = {item.name for item in items}
    if not config.getoption("keyword") and found ^ (passes | {*differs} | not_theirs):
        raise pytest.UsageError(
            f"{part}.toml and the tests differ: {sorted(found ^ (passes | {*differs} | not_theirs))}"
        )
    share = len(passes) / (len(passes) + len(differs))
    if share < listed["bar"]:
        raise pytest.UsageError(f"{part}.toml: {share:.3f} of the tests that transformers passes are to pass here, too")
    for item in items:
        if theirs and item.name in not_theirs:
            item.add_marker(pytest.mark.xfail(reason="not passed by transformers itself", strict=True))
        elif not theirs and item.name in differs:
            item.add_marker(pytest.mark.xfail(reason=differs[item.name], strict=True))
    if not theirs:
        config.hook.pytest_deselected(items=[item for item in items if item.name in not_theirs])
        items[:] = [item for item in items if item.name not in not_theirs]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is to pass and that is skipped did not pass."""
    report = yield
    expects_failure = item.get_closest_marker("xfail") is not None
    if report.skipped and not expects_failure:
        report.outcome, report.longrepr = "failed", f"skipped, expected to pass: {report.longrepr}"
    return report


def _make_importable(folder: Path) -> None:
    """Offers the package `hf_tests` in a folder, with empty forms of what the distribution lacks."""
    sys.path.append(str(folder))  # By name, for the processes that some tests start.
    stand_ins: dict[str, dict[str, Any]] = {
        "hf_tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "hf_tests.utils.test_configuration_utils": {"config_common_kwargs": COMMON_CONFIG},
        "tests.utils.test_modeling_flax_utils": {"check_models_equal": None},
    }
    for name, values in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module
        sys.modules.setdefault(name.rpartition(".")[0], types.ModuleType(name.rpartition(".")[0]))
    fixtures = folder / "hf_tests" / "fixtures"
    fixtures.mkdir(exist_ok=True)
    (fixtures / "sample_text.txt").write_text("The children went down to the river.\n\nA boat was there.\n" * 3)


# Keys that any configuration of transformers takes, each with a value that is no default.
COMMON_CONFIG: dict[str, Any] = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "torchscript": True,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "cross_attention_hidden_size": 128,
    "add_cross_attention": True,
    "tie_encoder_decoder": True,
    "architectures": ["BertModel"],
    "finetuning_task": "translation",
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "tokenizer_class": "BertTokenizerFast",
    "prefix": "prefix",
    "bos_token_id": 6,
    "pad_token_id": 7,
    "eos_token_id": 8,
    "sep_token_id": 9,
    "decoder_start_token_id": 10,
    "task_specific_params": {"translation": "some_params"},
    "problem_type": "regression",
}

_TORCH = {"XGLMModel": "xglm_torch", "XGLMForCausalLM": "xglm_torch"}
# By part, the classes and where ours are. Flax and TensorFlow's tests also load and save those of PyTorch.
_OURS = {
    "torch": _TORCH,
    "tf": {"TFXGLMModel": "xglm_tf", "TFXGLMForCausalLM": "xglm_tf", **_TORCH},
    "flax": {"FlaxXGLMModel": "xglm_flax", "FlaxXGLMForCausalLM": "xglm_flax", **_TORCH},
    "tokenizers": {"XGLMTokenizer": "xglm_core", "XGLMTokenizerFast": "xglm_core"},
}


def _replace(part: str) -> None:
    """Puts our classes where transformers offers its own.

    The order matters: `transformers.testing_utils` makes the lazy module `transformers` put its own classes back, so
    it has to be there before.
    """
    import transformers
    import transformers.testing_utils

    for name, package in {**_OURS[part], "XGLMConfig": "xglm_core"}.items():
        ours, theirs = getattr(importlib.import_module(package), name), getattr(transformers, name)
        for module in ("transformers", theirs.__module__.rpartition(".")[0], theirs.__module__):
            setattr(sys.modules[module], name, ours)


def _check_classes(part: str, *, theirs: bool) -> None:
    """Raises `pytest.UsageError` unless the classes that the tests got are those that were asked for."""
    import transformers

    for name, package in _OURS[part].items():
        module = getattr(transformers, name).__module__
        if not module.startswith("transformers." if theirs else package):
            raise pytest.UsageError(f"{name} under test is that of {module}")
