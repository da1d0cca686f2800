"""The original `model.pt` of fairseq: weights, and the architecture from `cfg`."""

import argparse
import pickle

import numpy as np
import pytest

from conformance.random_weights import random_weights
from tests.helpers.checkpoint_files import fairseq_checkpoint, library
from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMConfig, open_checkpoint
from xglm_core.checkpoint.fairseq import FairseqFile
from xglm_core.checkpoint.torch_bin import TorchFile
from xglm_core.errors import CheckpointError
from xglm_core.weight_names import EMBEDDING, HEAD

WEIGHTS = random_weights(CONFIG, seed=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.fixture
def checkpoint():
    return fairseq_checkpoint(CONFIG, WEIGHTS)


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def save(request, path):
    def save(value):
        library("torch").save(value, path, _use_new_zipfile_serialization=not request.param)
        return FairseqFile(path)

    return save


class TestReading:
    def test_weights_of_fairseq(self, checkpoint, save):
        file = save(checkpoint)
        assert file.tensors.keys() == {*WEIGHTS, HEAD}
        for name, array in {**WEIGHTS, HEAD: WEIGHTS[EMBEDDING]}.items():
            np.testing.assert_array_equal(file.read(name), array)

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("relu", "relu"),
            ("gelu", "gelu"),
            ("gelu_accurate", "gelu_new"),
            ("gelu_fast", "gelu_new"),
            ("swish", "silu"),
        ],
    )
    def test_activation(self, checkpoint, save, theirs, ours):
        """A 4.5B model without its ReLU is another model, whose weights load all the same."""
        checkpoint["cfg"]["model"].activation_fn = theirs
        assert save(checkpoint).config == changed(CONFIG, activation_function=ours)

    def test_other_settings(self, save):
        config = XGLMConfig.from_dict(
            {
                **CONFIG.to_dict(),
                "dropout": 0.3,
                "attention_dropout": 0.2,
                "activation_dropout": 0.4,
                "layerdrop": 0.5,
                "scale_embedding": False,
                "tie_word_embeddings": False,
                "max_position_embeddings": 99,
            }
        )
        head = {HEAD: WEIGHTS[EMBEDDING] + 1}
        file = save(fairseq_checkpoint(config, {**WEIGHTS, **head}))
        assert file.config == config
        np.testing.assert_array_equal(file.read(HEAD), head[HEAD])

    def test_dictionary_for_a_namespace(self, checkpoint, save):
        checkpoint["cfg"]["model"] = vars(checkpoint["cfg"]["model"])
        assert save(checkpoint).config == CONFIG
        checkpoint["cfg"] = argparse.Namespace(**checkpoint["cfg"])
        assert save(checkpoint).config == CONFIG

    def test_folder_needs_no_config(self, checkpoint, save, path):
        save(checkpoint)
        assert open_checkpoint(path.parent).config == CONFIG

    def test_names_beside_the_decoder(self, checkpoint, save):
        """What no XGLM has is no weight of ours, and is not passed over in silence."""
        checkpoint["model"]["decoder.embed_positions.weight"] = library("torch").ones(2, 35)
        checkpoint["model"]["encoder.decoder.weight"] = library("torch").ones(2)
        assert {"model.embed_positions.weight", "encoder.decoder.weight"} <= save(checkpoint).tensors.keys()


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda c: c.pop("model"), "expected a dictionary with the weights by name as 'model'"),
            (lambda c: c.update(model=3), "expected a dictionary with the weights by name as 'model'"),
            (lambda c: c.pop("cfg"), r"cfg\['model'\] is a NoneType, expected the settings of the model"),
            (lambda c: c["cfg"].pop("model"), r"cfg\['model'\] is a NoneType"),
            (lambda c: vars(c["cfg"]["model"]).pop("activation_fn"), r"cfg\['model'\] has no activation_fn"),
            (
                lambda c: vars(c["cfg"]["model"]).update(activation_fn="tanh"),
                "activation_fn is 'tanh', expected one of",
            ),
            (lambda c: vars(c["cfg"]["model"]).update(activation_fn=None), "activation_fn is 'None', expected one of"),
            (
                lambda c: vars(c["cfg"]["model"]).update(decoder_layers=[1]),
                "decoder_layers is a list, expected a number",
            ),
            (lambda c: vars(c["cfg"]["model"]).update(decoder_layers=-1), "num_layers is -1, expected a positive"),
            (lambda c: vars(c["cfg"]["model"]).update(dropout=float("nan")), "dropout is nan"),
            (lambda c: c["model"].pop("decoder.embed_tokens.weight"), "no matrix decoder.embed_tokens.weight"),
            (lambda c: c["model"].update({"decoder.x": 7}), "'model.x': is a int, expected a tensor"),
        ],
    )
    def test_damage(self, checkpoint, save, path, change, match):
        change(checkpoint)
        with pytest.raises(CheckpointError, match=match) as error:
            save(checkpoint)
        assert str(error.value).startswith(f"{path}: ")

    def test_other_objects(self, checkpoint, save):
        checkpoint["task_state"] = {"enum": pickle.PickleBuffer}
        with pytest.raises(CheckpointError, match=r"refused: the pickle names '_?pickle\.PickleBuffer'"):
            save(checkpoint)

    def test_namespaces_are_for_fairseq_alone(self, checkpoint, save, path):
        save(checkpoint)
        with pytest.raises(CheckpointError, match=r"refused: the pickle names 'argparse\.Namespace'"):
            TorchFile(path)

    def test_namespace_is_inert(self, checkpoint, save):
        """A file's namespace may name any attribute; none of ours becomes what it says."""
        vars(checkpoint["cfg"]["model"]).update(__class__="x", keys="y", get="z")
        assert save(checkpoint).config == CONFIG
