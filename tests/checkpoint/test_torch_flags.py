"""Tensors of PyTorch whose stored numbers are not their values: what is flagged is refused, in every container."""

import numpy as np
import pytest

from conformance.random_weights import random_weights
from tests.helpers.checkpoint_files import fairseq_checkpoint, library, tensors
from tests.helpers.models import CONFIG
from xglm_core import convert_checkpoint, open_checkpoint
from xglm_core.errors import CheckpointError

NAME = "model.layers.1.fc1.bias"
WEIGHTS = random_weights(CONFIG, seed=1)


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def save(request, tmp_path):
    """Writes a checkpoint of PyTorch or of fairseq, with one tensor changed; returns its folder."""

    def save(change, *, fairseq=False, wrap=lambda tensor: tensor):
        whole = fairseq_checkpoint(CONFIG, WEIGHTS) if fairseq else tensors(WEIGHTS)
        state = whole["model"] if fairseq else whole
        name = NAME.replace("model.", "decoder.", 1) if fairseq else NAME
        state[name] = wrap(change(state[name]))
        path = tmp_path / ("model.pt" if fairseq else "pytorch_model.bin")
        library("torch").save(whole, path, _use_new_zipfile_serialization=not request.param)
        CONFIG.save_pretrained(tmp_path)
        return tmp_path

    return save


def negated(tensor):
    """The same values, of which the file holds the opposite ones."""
    return library("torch")._neg_view(-tensor)


@pytest.mark.parametrize("fairseq", [False, True])
def test_a_negative_view_is_refused(save, fairseq):
    with pytest.raises(
        CheckpointError, match=r"tensor '.*\.1\.fc1\.bias': is stored with the flags 'neg'.*resolve_neg"
    ):
        open_checkpoint(save(negated, fairseq=fairseq))


def test_a_parameter_with_a_negative_view_is_refused(save):
    with pytest.raises(CheckpointError, match="flags 'neg'"):
        open_checkpoint(save(negated, wrap=library("torch").nn.Parameter))


def test_nothing_is_converted(save, tmp_path):
    with pytest.raises(CheckpointError, match="flags 'neg'"):
        convert_checkpoint(save(negated), tmp_path / "new", to="safetensors")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fairseq", [False, True])
def test_what_was_resolved_is_read(save, fairseq):
    checkpoint = open_checkpoint(save(lambda tensor: negated(tensor).resolve_neg(), fairseq=fairseq))
    np.testing.assert_array_equal(checkpoint.read(NAME), WEIGHTS[NAME])
