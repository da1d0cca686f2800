"""What scripts and libraries ask of any model: names, sizes, parts."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, changed
from xglm_core import XGLMConfig
from xglm_core.errors import ConfigError, InputError
from xglm_core.weight_names import num_parameters

TABLE = CONFIG.vocab_size * CONFIG.d_model


def test_names(fw, model):
    bare = fw.decoder(CONFIG)
    assert (model.can_generate(), fw.causal_lm.can_generate(), bare.can_generate()) == (True, True, False)
    assert (model.config_class, model.base_model_prefix, model.main_input_name) == (XGLMConfig, "model", "input_ids")
    assert model.framework == {"torch": "pt", "tf": "tf", "flax": "flax"}[fw.name]
    assert (model.vocab_size, bare.vocab_size, bare.name_or_path) == (131, 131, "")
    with pytest.raises(InputError, match="register_for_auto_class is not offered"):
        fw.causal_lm.register_for_auto_class("AutoModelForCausalLM")


@pytest.mark.parametrize("tied", [True, False])
def test_numbers_of_parameters(fw, load, tied):
    config = changed(CONFIG, tie_word_embeddings=tied)
    model = load(config)
    total = num_parameters(config)
    assert model.num_parameters() == model.num_parameters(only_trainable=True) == total
    assert model.num_parameters(exclude_embeddings=True) == total - TABLE
    buffers = {"torch": 4 * 35 * (61 + 2)}.get(fw.name, 0)
    assert model.get_memory_footprint() == 4 * total + buffers


def test_frozen_parameters(fw, load):
    model = load(CONFIG)
    if fw.name == "flax":
        pytest.skip("there, what is trained is the optimizer's affair")
    if fw.name == "torch":
        model.get_input_embeddings().requires_grad_(False)
    else:
        model.get_input_embeddings().trainable = False
    assert model.num_parameters(only_trainable=True) == num_parameters(CONFIG) - TABLE


def test_dummy_inputs(fw, model):
    assert fw.numpy(model(**model.dummy_inputs).logits).shape == (3, 5, 131)


def test_parts(fw, model, load):
    if fw.name == "flax":
        pytest.skip("the parameters are no part of a module")
    assert model.get_decoder() is model.model
    if fw.name == "torch":
        other = load(CONFIG)
        assert model.base_model is model.model.base_model is model.model
        other.set_decoder(fw.causal_lm(CONFIG).model)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        with pytest.raises(InputError, match="this is the decoder"):
            other.model.set_decoder(model.model)


def test_of_a_configuration(fw):
    model = fw.causal_lm._from_config(CONFIG, dtype="bfloat16")
    assert "bfloat16" in str(fw.call(model, IDS).logits.dtype)
    if fw.name == "torch":
        model = fw.causal_lm._from_config(CONFIG, torch_dtype="bfloat16", attn_implementation="sdpa", use_cache=False)
        assert (str(model.dtype), model.config) == ("torch.bfloat16", changed(CONFIG, use_cache=False))


def test_length_of_a_cache(fw, model):
    assert fw.call(model, IDS).past_key_values.get_seq_length() == IDS.shape[1]


def test_an_impossible_change_is_found_when_a_model_is_built(fw):
    for kind in (fw.causal_lm, fw.decoder):
        config = XGLMConfig(vocab_size=53, d_model=32, ffn_dim=8, num_layers=1, attention_heads=4)
        config.attention_heads = 5
        with pytest.raises(ConfigError, match="d_model=32 is not a multiple of attention_heads=5"):
            kind(config)


class TestResizingAroundTheMean:
    def test_rows(self, fw, load):
        model = load(CONFIG)
        before = fw.embedding_matrix(model)
        model.resize_token_embeddings(150, mean_resizing=True)
        after = fw.embedding_matrix(model)
        np.testing.assert_array_equal(after[:131], before)
        mean, deviation = before.mean(axis=0), before.std(axis=0)
        assert np.abs(after[131:] - mean).max() < 5e-4 * deviation.max()
        assert len({row.tobytes() for row in after[131:]}) == 19

    def test_the_next_token_hardly_changes(self, fw, load):
        """A new row's logit is the mean of the others, where one drawn at random may be the likeliest."""
        model = load(CONFIG)
        before = fw.logits(model, IDS)
        model.resize_token_embeddings(150, mean_resizing=True)
        new = fw.logits(model, IDS)[..., 131:]
        np.testing.assert_allclose(new, np.broadcast_to(before.mean(-1, keepdims=True), new.shape), atol=1e-2)
