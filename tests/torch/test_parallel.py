"""Two processes on one machine, for two devices: what they compute is what one computes."""

import subprocess
import sys

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

from conformance.random_weights import write_checkpoint
from tests.torch.run_in_processes import EVEN, IDS, LABELS, LAST_SAVED, MASK, STEPS, load
from xglm_torch import XGLMForCausalLM
from xglm_torch.parallel import load_state


def run(folder, *tasks):
    """Runs tasks at once, each in two processes; returns their exit codes."""
    commands = [
        [sys.executable, "-m", "tests.torch.run_in_processes", t, str(r), str(folder)] for t in tasks for r in range(2)
    ]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(errors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel")
    write_checkpoint(path / "model", EVEN, seed=1)
    codes, errors = run(path, "check", "killed")
    assert codes[:2] == [0, 0], errors
    assert codes[2] != 0
    assert codes[3] == 9
    return path


@pytest.fixture(scope="module")
def expected(folder):
    """The model in one process, after its backward pass, and its loss."""
    model = load(folder)
    loss = model(IDS, MASK, labels=LABELS, use_cache=False).loss
    loss.backward()
    return model, loss.item()


@pytest.mark.parametrize("name", ["fsdp", "tensor", "mesh"])
def test_as_on_one_device(folder, expected, name):
    model, loss = expected
    found = torch.load(folder / f"{name}.pt")
    assert found["tied"]
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["evaluated"] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(found["logits"], model(IDS).logits.detach(), rtol=0, atol=1e-5)
    assert found["gradients"].keys() == {parameter for parameter, _ in model.named_parameters()}
    for parameter, tensor in model.named_parameters():
        torch.testing.assert_close(found["gradients"][parameter], tensor.grad, rtol=0, atol=1e-6, msg=parameter)


def test_mixed_precision(folder, expected):
    model, loss = expected
    found = torch.load(folder / "bfloat16.pt")
    assert found["loss"] == pytest.approx(loss, rel=0.01)
    for parameter, tensor in model.named_parameters():
        gradient = found["gradients"][parameter]
        assert gradient.dtype is torch.float32
        if not parameter.endswith("k_proj.bias"):  # Rounding alone.
            assert (gradient - tensor.grad).norm() < 0.05 * tensor.grad.norm(), parameter


@pytest.mark.parametrize("name", ["fsdp", "tensor", "mesh"])
def test_scores_and_texts(folder, name):
    model = load(folder).eval()
    found = torch.load(folder / f"{name}.pt")
    torch.testing.assert_close(found["scores"], model.score(IDS, MASK), rtol=0, atol=1e-5)
    if name == "fsdp":
        assert torch.equal(found["texts"], model.generate(IDS, MASK, max_new_tokens=4))


def test_scores_gather_parameters(folder):
    expected = load(folder).eval().score(IDS, MASK)
    torch.testing.assert_close(torch.load(folder / "scored-first-1.pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fsdp", "tensor", "mesh", "bfloat16"])
def test_exported(folder, name):
    files = {path.name for path in (folder / name).iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    assert (folder / name / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    assert XGLMForCausalLM.from_pretrained(folder / name).config.to_dict() == EVEN.to_dict()


def test_wrong_meshes_and_states(folder):
    assert (
        (folder / "error.txt")
        .read_text()
        .startswith("the model cannot be split evenly over 2 devices: attention_heads=5, ffn_dim=53, vocab_size=131")
    )
    assert "a model split among devices keeps no cache" in (folder / "cache.txt").read_text()
    assert all((folder / f"unwritable-{rank}.txt").read_text() for rank in range(2))
    assert "the first process could not write the checkpoint" in (folder / "unwritable-1.txt").read_text()


def test_a_killed_run_goes_on(folder):
    codes, errors = run(folder, "resumed")
    assert codes == [0, 0], errors
    lines = [line.split() for line in (folder / "losses-0.txt").read_text().splitlines()]
    assert [int(step) for step, _ in lines] == list(range(STEPS))  # Nothing was done twice.
    model = load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _, loss in lines:
        ours = model(IDS, labels=LABELS, use_cache=False).loss
        assert float(loss) == pytest.approx(ours.item(), rel=1e-5)
        ours.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_one_process_reads_the_state_of_two(folder):
    model = load(folder)
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert load_state(folder / "nothing", model, optimizer) == 0
    assert load_state(folder / "states", model, optimizer) == LAST_SAVED
    assert not torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {state["step"].item() for state in optimizer.state.values()} == {LAST_SAVED}
