"""The keywords that scripts written for transformers give to `from_pretrained` and `save_pretrained`."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest

from tests.helpers.checkpoint_files import library
from tests.helpers.models import CONFIG, IDS, changed
from xglm_core import GenerationConfig, XGLMConfig
from xglm_core.errors import CheckpointError, ConfigError, InputError
from xglm_core.keywords import LOADED_NOT_OFFERED, LOADED_WITHOUT_EFFECT, SAVED_NOT_OFFERED, SAVED_WITHOUT_EFFECT


def same(fw, first, second):
    np.testing.assert_array_equal(fw.logits(first, IDS), fw.logits(second, IDS))
    return True


class TestLoading:
    def test_torch_dtype_is_dtype(self, fw, folder):
        for name in ("bfloat16", "auto" if fw.name != "flax" else "float32"):
            loaded, asked = (fw.causal_lm.from_pretrained(folder, **{key: name}) for key in ("torch_dtype", "dtype"))
            assert str(loaded.dtype) == str(asked.dtype)
        with pytest.raises(InputError, match="torch_dtype and dtype are both given"):
            fw.causal_lm.from_pretrained(folder, torch_dtype="float16", dtype="float16")

    def test_none_is_not_given(self, fw, folder, model):
        names = {**LOADED_NOT_OFFERED, **LOADED_WITHOUT_EFFECT}
        options = dict.fromkeys([*names, "torch_dtype", "dtype", "config", "subfolder", "use_auth_token", "token"])
        assert same(fw, fw.causal_lm.from_pretrained(folder, **options), model)

    def test_what_has_no_effect(self, fw, folder, model):
        options = {**dict.fromkeys(LOADED_WITHOUT_EFFECT, True), "attn_implementation": "eager", "proxies": {}}
        assert same(fw, fw.causal_lm.from_pretrained(folder, **options), model)
        assert same(fw, fw.causal_lm.from_pretrained(folder, attn_implementation="sdpa"), model)

    @pytest.mark.parametrize("name", LOADED_NOT_OFFERED)
    def test_what_is_not_offered(self, fw, folder, name):
        if name in ("device_map", "quantization", "state_dict") and fw.name == "torch":
            pytest.skip("is offered there")
        with pytest.raises(InputError, match=rf"^{name} is not offered here; \w[^\n]*$"):
            fw.causal_lm.from_pretrained(folder, **{name: "anything"})

    def test_what_nobody_knows(self, fw, folder):
        with pytest.raises(InputError, match=r"^wheels: no option of from_pretrained, nor a key of the configuration$"):
            fw.causal_lm.from_pretrained(folder, wheels=4)

    def test_formats_by_their_flags(self, fw, folder):
        assert fw.causal_lm.from_pretrained(folder, use_safetensors=True)
        with pytest.raises(CheckpointError, match=r"no flax_model\.msgpack here"):
            fw.causal_lm.from_pretrained(folder, from_flax=True)
        with pytest.raises(CheckpointError, match=r"no tf_model\.h5 here"):
            fw.causal_lm.from_pretrained(folder, from_tf=True)

    def test_keys_of_the_configuration(self, fw, folder):
        model = fw.causal_lm.from_pretrained(folder, dropout=0.0, output_attentions=True, num_hidden_layers=3)
        assert model.config == changed(CONFIG, dropout=0.0, output_attentions=True)
        assert fw.call(model, IDS).attentions is not None
        with pytest.raises(ConfigError, match=r"dropout is 7\.0"):
            fw.causal_lm.from_pretrained(folder, dropout=7.0)

    def test_a_configuration(self, fw, folder, tmp_path):
        longer = changed(CONFIG, max_position_embeddings=97)
        kept = copy.deepcopy(longer)
        assert fw.causal_lm.from_pretrained(folder, config=longer).config == longer == kept
        assert fw.causal_lm.from_pretrained(folder, config=longer, use_cache=False).config.use_cache is False
        longer.save_pretrained(tmp_path)
        for place in (tmp_path, str(tmp_path / "config.json")):
            assert fw.decoder.from_pretrained(folder, config=place).config == longer

    def test_a_configuration_of_transformers(self, fw, folder):
        class Theirs:
            def to_dict(self):
                return {**CONFIG.to_dict(), "max_position_embeddings": 97, "transformers_version": "4.57.6"}

        assert fw.causal_lm.from_pretrained(folder, config=Theirs()).config.max_position_embeddings == 97
        with pytest.raises(InputError, match="config is a int, expected an XGLMConfig"):
            fw.causal_lm.from_pretrained(folder, config=4)

    def test_subfolder(self, fw, folder, model, tmp_path):
        shutil.copytree(folder, tmp_path / "a" / "b")
        assert same(fw, fw.causal_lm.from_pretrained(tmp_path, subfolder="a/b"), model)
        assert XGLMConfig.from_pretrained(tmp_path, subfolder="a/b") == CONFIG
        with pytest.raises(CheckpointError, match="c: no such folder, which `subfolder` names"):
            fw.causal_lm.from_pretrained(tmp_path, subfolder="c")

    def test_loading_info(self, fw, folder, model):
        loaded, info = fw.causal_lm.from_pretrained(folder, output_loading_info=True)
        assert same(fw, loaded, model)
        assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}

    def test_the_first_argument_by_name(self, fw, folder, tmp_path):
        model = fw.decoder.from_pretrained(pretrained_model_name_or_path=folder)
        model.save_pretrained(save_directory=tmp_path)
        assert XGLMConfig.from_pretrained(pretrained_model_name_or_path=tmp_path) == model.config

    def test_where_a_model_comes_from(self, fw, folder, model):
        assert vars(model)["name_or_path"] == model.name_or_path == str(folder)  # peft looks into `vars`.


class TestSaving:
    def test_what_has_no_effect(self, fw, model, tmp_path):
        options = {**dict.fromkeys(SAVED_WITHOUT_EFFECT, "anything"), **dict.fromkeys(SAVED_NOT_OFFERED)}
        model.save_pretrained(tmp_path, **options, is_main_process=True, safe_serialization=True)
        assert same(fw, fw.causal_lm.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("name", [name for name in SAVED_NOT_OFFERED if name != "state_dict"])
    def test_what_is_not_offered(self, fw, model, tmp_path, name):
        for saved in (model, model.config, model.generation_config):
            with pytest.raises(InputError, match=rf"^{name} is not offered here; \w"):
                saved.save_pretrained(tmp_path, **{name: "anything"})
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"safe_serialization": False}, "safe_serialization=False is not offered; .*xglm convert"),
            ({"wheels": 4}, "wheels is not an option of save_pretrained"),
        ],
    )
    def test_other_formats_and_what_nobody_knows(self, fw, model, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            model.save_pretrained(tmp_path, **options)

    def test_by_another_process(self, fw, model, tmp_path):
        model.save_pretrained(tmp_path, is_main_process=False)
        assert not [*tmp_path.iterdir()]

    def test_to_the_hub(self, model):
        for ours in (model, model.config):
            with pytest.raises(InputError, match=r"push_to_hub is not offered here; .*upload_folder"):
                ours.push_to_hub("name")


class TestConfigurations:
    def test_keys(self, folder):
        assert XGLMConfig.from_pretrained(folder, dropout=0.5, trust_remote_code=True).dropout == 0.5
        with pytest.raises(InputError, match=r"^wheels: no option"):
            XGLMConfig.from_pretrained(folder, wheels=4)

    def test_unused_keys(self, folder):
        config, unused = XGLMConfig.from_pretrained(folder, dropout=0.5, wheels=4, return_unused_kwargs=True)
        assert (config, unused) == (changed(CONFIG, dropout=0.5), {"wheels": 4})

    def test_generation(self, tmp_path):
        GenerationConfig(num_beams=3).save_pretrained(tmp_path, "other.json", push_to_hub=False)
        read = GenerationConfig.from_pretrained(tmp_path, "other.json", top_k=7)
        assert read == dataclasses.replace(GenerationConfig(), num_beams=3, top_k=7)


class TestDevices:
    @pytest.fixture(autouse=True)
    def only_torch(self, fw):
        if fw.name != "torch":
            pytest.skip("Keras and JAX place models by their own context managers")

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, None])
    def test_one(self, fw, folder, model, device_map):
        assert same(fw, fw.causal_lm.from_pretrained(folder, device_map=device_map), model)

    @pytest.mark.parametrize("device_map", ["meta", {"": "meta"}])
    def test_another(self, fw, folder, device_map):
        assert fw.causal_lm.from_pretrained(folder, device_map=device_map).device.type == "meta"

    def test_auto(self, fw, folder):
        torch = library("torch")
        expected = torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.device_count() < 2:
            assert fw.causal_lm.from_pretrained(folder, device_map="auto").device.type == expected.type

    @pytest.mark.parametrize(
        ("device_map", "message"),
        [
            ({"model": 0, "lm_head": "cpu"}, "names several places, .*dispatch_model"),
            ("foo", "'foo', expected a device"),
        ],
    )
    def test_impossible(self, fw, folder, device_map, message):
        with pytest.raises(InputError, match=message):
            fw.causal_lm.from_pretrained(folder, device_map=device_map)
