"""Options of `generate` in the files of a checkpoint: obeyed, or named in one warning."""

import json
import warnings

import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, IDS, ONE_BLOCK
from xglm_core import GenerationConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import NOT_OFFERED

HARMLESS = {
    "_from_model_config": True,
    "transformers_version": "4.57.6",
    "cache_implementation": "static",
    "use_cache": False,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "prompt_lookup_num_tokens": 3,
    "num_assistant_tokens": 20,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "penalty_alpha": None,
}


def checkpoint(path, file=None, **config):
    """A checkpoint with a `generation_config.json`, or with such options in its `config.json`."""
    write_checkpoint(path, ONE_BLOCK, seed=1)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | config))
    (path / "generation_config.json").unlink(missing_ok=True)
    if file is not None:
        (path / "generation_config.json").write_text(json.dumps(file))
    return path


class TestOptionsThatAreNotOffered:
    @pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
    def test_are_named_when_loading_and_not_when_saving(self, fw, tmp_path, where):
        options = {"penalty_alpha": 0.6, "dola_layers": "high", "diversity_penalty": 0.5, "num_beam_groups": 2}
        options |= {"no_repeat_ngram_size": 2}
        folder = checkpoint(tmp_path / "a", **({"file": options} if where != "config.json" else options))
        with pytest.warns(
            UserWarning, match="has penalty_alpha, .*dola_layers.*, which generate does not offer"
        ) as found:
            model = fw.causal_lm.from_pretrained(folder)
        assert len([warning for warning in found if "offer" in str(warning.message)]) == 1
        assert model.generation_config.no_repeat_ngram_size == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(tmp_path / "b")
        saved = json.loads((tmp_path / "b" / "generation_config.json").read_text())
        assert saved["penalty_alpha"] == 0.6

    def test_in_a_call_are_errors(self):
        for name in ("penalty_alpha", "num_beam_groups", "diversity_penalty", "dola_layers"):
            with pytest.raises(InputError, match=f"{name} is not offered here"):
                GenerationConfig().updated({name: 5})

    def test_are_not_named_where_they_do_nothing(self, tmp_path):
        folder = checkpoint(tmp_path, HARMLESS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GenerationConfig.from_pretrained(folder)
        assert {name for name in HARMLESS if name in NOT_OFFERED}

    def test_by_the_configuration_alone(self, tmp_path):
        with pytest.warns(UserWarning, match="has penalty_alpha, which generate does not offer"):
            GenerationConfig.from_pretrained(checkpoint(tmp_path, {"penalty_alpha": 0.6}))


OLD = {"num_beams": 3, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "max_length": 17}


class TestAnOldConfiguration:
    def test_says_how_to_generate(self, fw, tmp_path):
        model = fw.causal_lm.from_pretrained(checkpoint(tmp_path / "a", **OLD, do_sample=False, top_k=50))
        options = {name: value for name, value in OLD.items() if name != "max_length"}
        expected = fw.generate(model, IDS, generation_config=GenerationConfig(max_new_tokens=6, **options))
        np.testing.assert_array_equal(fw.generate(model, IDS), expected)
        plain = GenerationConfig(max_new_tokens=6, num_beams=1)
        assert not np.array_equal(fw.generate(model, IDS, generation_config=plain), expected)
        model.save_pretrained(tmp_path / "b")
        again = fw.causal_lm.from_pretrained(tmp_path / "b")
        assert again.generation_config == model.generation_config

    def test_says_nothing_beside_a_file_of_options(self, tmp_path):
        folder = checkpoint(tmp_path, {"top_p": 0.5}, **OLD)
        options = GenerationConfig.from_model(CONFIG.from_pretrained(folder), folder)
        assert (options.num_beams, options.max_length, options.top_p) == (1, None, 0.5)

    def test_may_list_the_defaults_of_its_time(self, tmp_path):
        """Of 20 columns in all nobody spoke."""
        defaults = {"max_length": 20, "min_length": 0, "num_beams": 1, "do_sample": False, "top_k": 50, "top_p": 1.0}
        defaults |= {"temperature": 1.0, "bad_words_ids": None, "diversity_penalty": 0.0, "num_beam_groups": 1}
        folder = checkpoint(tmp_path, **defaults)
        config = CONFIG.from_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            options = GenerationConfig.from_model(config, folder)
            options.warn_of_others()
        assert options.max_length is None
        assert options == GenerationConfig(eos_token_id=2, pad_token_id=1, other=options.other)


def test_a_file_may_have_temperature_0_where_nothing_is_drawn(fw, tmp_path):
    file = {"temperature": 0.0, "top_p": 0.0, "top_k": None, "eos_token_id": 2, "pad_token_id": 1}
    model = fw.causal_lm.from_pretrained(checkpoint(tmp_path, file))
    plain = fw.generate(model, IDS, generation_config=GenerationConfig(max_new_tokens=3))
    np.testing.assert_array_equal(fw.generate(model, IDS, max_new_tokens=3), plain)
    with pytest.raises(InputError, match=r"temperature is 0\.0, expected a positive number"):
        fw.generate(model, IDS, do_sample=True)
    with pytest.raises(InputError, match=r"temperature is 0\.0, expected a positive number"):
        fw.generate(model, IDS, do_sample=True, temperature=0.0, top_p=0.5)
