"""The examples that fine-tune in PyTorch, for a few steps: they begin at the same loss, and learn."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

from examples.finetune_data import CHECKPOINT, batches
from tests.helpers.commands import ROOT
from xglm_core import XGLMTokenizer
from xglm_torch import XGLMForCausalLM

pytestmark = pytest.mark.slow

STEPS = 4
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EXAMPLES = {
    "plain": ["examples/finetune_torch.py", "--gradient-checkpointing"],
    "lora": ["examples/finetune_torch_lora.py"],
    "fsdp": [*TORCHRUN, "examples/finetune_torch_fsdp.py", "--save-every", "3"],
    "mesh": [*TORCHRUN, "examples/finetune_torch_mesh.py"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        for name, command in reversed(EXAMPLES.items()):  # Those that start processes first.
            arguments = [*command, "--steps", str(STEPS), "--output", str(path / name)]
            if "-m" in arguments:
                processes[name] = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            else:
                patch.setattr(sys, "argv", arguments)
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    outputs = {name: process.communicate(timeout=240)[0] for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, outputs[name]
        assert f"step    1 of {STEPS}" in outputs[name]
    return path


def losses(folder, name):
    return json.loads((folder / name / "losses.json").read_text())["losses"]


@pytest.fixture(scope="module")
def first():
    """The first batch, and the loss of the bundled model there."""
    (batch,) = batches(XGLMTokenizer.from_pretrained(CHECKPOINT), 1)
    batch = {key: torch.from_numpy(array) for key, array in batch.items()}
    with torch.no_grad():
        return batch, XGLMForCausalLM.from_pretrained(CHECKPOINT)(**batch).loss.item()


@pytest.mark.parametrize("name", EXAMPLES)
def test_losses(folder, first, name):
    found = losses(folder, name)
    assert len(found) == STEPS
    assert found[0] == pytest.approx(first[1], rel=1e-6)
    assert found[-1] < found[0]
    if name != "lora":
        assert found == pytest.approx(losses(folder, "plain"), rel=1e-4)


@pytest.mark.parametrize("name", EXAMPLES)
def test_saved_models(folder, first, name):
    batch, before = first
    model = XGLMForCausalLM.from_pretrained(folder / name)
    with torch.no_grad():
        assert model(**batch).loss.item() < before - 0.1
    XGLMTokenizer.from_pretrained(folder / name)
    assert (folder / name / "losses.png").exists()


def test_states_and_adapter(folder):
    assert [path.name for path in (folder / "fsdp" / "states").iterdir()] == ["step-00000003"]
    assert (folder / "lora" / "adapter" / "adapter_config.json").exists()
