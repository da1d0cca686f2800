"""With weights that accelerate keeps in memory or on a disk, calls, texts, scores and files are the same."""

import accelerate
import pytest
import torch

from conformance.random_weights import write_checkpoint
from tests.helpers import models
from tests.helpers.models import CONFIG, changed
from xglm_core.errors import InputError
from xglm_torch import XGLMForCausalLM, XGLMModel

IDS, LEFT = torch.from_numpy(models.IDS), torch.from_numpy(models.LEFT)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("offload") / "model"
    write_checkpoint(path, changed(CONFIG, tie_word_embeddings=request.param), seed=1)
    return path


def _on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def _in_parts(model, folder):
    devices = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.embed_positions": "cpu", "model.layer_norm": "cpu",
               "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
    return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=folder)


def _loaded_in_parts(model, folder):
    model.save_pretrained(folder / "model")
    with accelerate.init_empty_weights():
        empty = XGLMForCausalLM(model.config)
    empty.tie_weights()
    devices = {"": "cpu"} if model.config.tie_word_embeddings else {"model": "disk", "lm_head": "cpu"}
    return accelerate.load_checkpoint_and_dispatch(
        empty, folder / "model", devices, offload_folder=folder / "parts"
    ).eval()


WAYS = {
    "in memory": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "on disk": _on_disk,
    "in parts": _in_parts,
    "loaded in parts": _loaded_in_parts,
}


@pytest.mark.parametrize("way", WAYS)
def test_offloaded(folder, way, tmp_path):
    plain = XGLMForCausalLM.from_pretrained(folder)
    model = WAYS[way](XGLMForCausalLM.from_pretrained(folder), tmp_path / "offloaded")
    assert model.device == torch.device("cpu")
    torch.testing.assert_close(model(IDS, LEFT).logits, plain(IDS, LEFT).logits, **models.SAME)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1}, {"repetition_penalty": 2.0}):
        found = model.generate(IDS, LEFT, max_new_tokens=4, stop_at_eos=False, **options)
        assert torch.equal(found, plain.generate(IDS, LEFT, max_new_tokens=4, stop_at_eos=False, **options)), options
    torch.testing.assert_close(model.score(IDS, LEFT), plain.score(IDS, LEFT), **models.SAME)
    model.save_pretrained(tmp_path / "saved")
    again = XGLMForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, value), expected in zip(again.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, expected), name
    if any(parameter.is_meta for parameter in model.parameters()):
        with pytest.raises(InputError, match=r"weight is kept elsewhere \(accelerate: remove_hook_from_submodules\)"):
            model.prune_heads({1: [0]})


def test_the_bare_decoder(folder, tmp_path):
    plain = XGLMModel.from_pretrained(folder)
    model = accelerate.cpu_offload(XGLMModel.from_pretrained(folder), execution_device="cpu")
    torch.testing.assert_close(model(IDS)[0], plain(IDS)[0], **models.SAME)
    model.save_pretrained(tmp_path)
    assert torch.equal(XGLMModel.from_pretrained(tmp_path)(IDS)[0], plain(IDS)[0])


def test_a_model_without_numbers(tmp_path):
    with torch.device("meta"):
        model = XGLMForCausalLM(CONFIG)
    with pytest.raises(InputError, match="is on the meta device and has no numbers"):
        model.save_pretrained(tmp_path)
