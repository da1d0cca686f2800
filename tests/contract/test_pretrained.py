"""What loading and saving promise in every backend."""

import json
from pathlib import Path

import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, IDS
from xglm_core import GenerationConfig, XGLMConfig, open_checkpoint
from xglm_core.errors import CheckpointError, ConfigError
from xglm_core.weight_names import num_parameters


class TestCheckpoints:
    def test_round_trip_is_exact(self, fw, model, folder, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="9KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        ours, theirs = open_checkpoint(tmp_path), open_checkpoint(folder)
        assert ours.config == theirs.config
        assert ours.names == theirs.names
        for name in ours.names:
            assert np.array_equal(ours.read(name), theirs.read(name)), name
        assert np.array_equal(fw.logits(fw.causal_lm.from_pretrained(tmp_path), IDS), fw.logits(model, IDS))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_files_load_as_float32_unless_asked(self, fw, model, tmp_path, dtype):
        model.save_pretrained(tmp_path, dtype=dtype)
        stored = open_checkpoint(tmp_path)
        assert {stored.info(name).dtype.name for name in stored.names} == {dtype}
        assert fw.call(fw.causal_lm.from_pretrained(tmp_path), IDS).logits.dtype == fw.call(model, IDS).logits.dtype
        # Flax's `dtype` is the type of the computation; `param_dtype` is the parameters'.
        kept = fw.causal_lm.from_pretrained(tmp_path, **{"param_dtype" if fw.name == "flax" else "dtype": "auto"})
        kept.save_pretrained(tmp_path / "again")
        again = open_checkpoint(tmp_path / "again")
        for name in stored.names:
            assert again.info(name).dtype.name == dtype
            assert np.array_equal(again.read(name), stored.read(name)), name

    def test_untied_head(self, fw, model, tmp_path):
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": False})
        write_checkpoint(tmp_path, config, seed=1)
        untied = fw.causal_lm.from_pretrained(tmp_path)
        assert untied.num_parameters() == num_parameters(config) == num_parameters(CONFIG) + 131 * 35
        assert abs(fw.logits(untied, IDS) - fw.logits(model, IDS)).max() > 0.1
        values = json.loads((tmp_path / "config.json").read_text())
        values["tie_word_embeddings"] = True
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.warns(UserWarning, match=r"lm_head.weight differs from model.embed_tokens.weight"):
            warned = fw.causal_lm.from_pretrained(tmp_path)
        assert warned.config.tie_word_embeddings is False
        assert np.array_equal(fw.logits(warned, IDS), fw.logits(untied, IDS))

    def test_options_of_generate_are_kept(self, fw, tmp_path):
        write_checkpoint(tmp_path, CONFIG, seed=1)
        assert fw.causal_lm.from_pretrained(tmp_path).generation_config == GenerationConfig.from_model(CONFIG)
        options = {"max_new_tokens": 3, "repetition_penalty": 1.5, "suppress_tokens": [5], "_from_model_config": True}
        (tmp_path / "generation_config.json").write_text(json.dumps(options))
        model = fw.causal_lm.from_pretrained(tmp_path)
        assert model.generation_config.max_new_tokens == 3
        assert fw.generate(model, IDS).shape == (2, 14)
        model.save_pretrained(tmp_path / "again")
        again = fw.causal_lm.from_pretrained(tmp_path / "again").generation_config
        assert again == model.generation_config
        assert again.other == {"_from_model_config": True}
        (tmp_path / "generation_config.json").write_text("{")
        with pytest.raises(ConfigError, match=r"generation_config.json: cannot be read as JSON"):
            fw.causal_lm.from_pretrained(tmp_path)

    def test_number_of_parameters(self, fw, model, folder):
        assert model.num_parameters() == num_parameters(CONFIG)
        assert fw.decoder.from_pretrained(folder).num_parameters() == num_parameters(CONFIG)

    def test_decoder_and_causal_lm_read_each_others_folders(self, fw, model, folder, tmp_path):
        fw.decoder.from_pretrained(folder).save_pretrained(tmp_path)
        assert np.array_equal(fw.logits(fw.causal_lm.from_pretrained(tmp_path), IDS), fw.logits(model, IDS))

    def test_fresh_models_can_be_saved_and_differ_from_zero(self, fw, tmp_path):
        fresh = fw.causal_lm(CONFIG)
        fresh.save_pretrained(tmp_path)
        stored = open_checkpoint(tmp_path)
        table = stored.read("model.embed_tokens.weight")
        assert not table[CONFIG.pad_token_id].any()
        assert table.std() == pytest.approx(CONFIG.init_std, rel=0.1)  # 4,585 draws: 1% is one standard error.
        for name in stored.names:
            if name.endswith("bias"):
                assert not stored.read(name).any(), name
        assert np.isfinite(fw.logits(fw.causal_lm.from_pretrained(tmp_path), IDS)).all()

    def test_all_misfits_are_named_at_once(self, fw, tmp_path):
        write_checkpoint(tmp_path, CONFIG, seed=1)
        XGLMConfig.from_dict({**CONFIG.to_dict(), "ffn_dim": 59, "num_layers": 4}).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            fw.causal_lm.from_pretrained(tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        assert "missing: model.layers.3.self_attn.k_proj.weight, " in message
        for layer in range(3):
            assert f"model.layers.{layer}.fc1.weight is [53, 35], expected [59, 35]" in message

    def test_no_checkpoint(self, fw, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(CheckpointError, match=r"no checkpoint here; expected config.json and .* found notes.txt"):
            fw.causal_lm.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="no such folder"):
            fw.causal_lm.from_pretrained(Path(tmp_path) / "absent")
