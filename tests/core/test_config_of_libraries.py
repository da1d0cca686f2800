"""What libraries ask of any configuration."""

import json

import pytest

from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMConfig
from xglm_core.errors import ConfigError


def test_aliases_read_and_write():
    config = changed(CONFIG)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (35, 5, 3)
    config.num_hidden_layers = 7
    assert config.num_layers == 7
    assert config.attribute_map["hidden_size"] == "d_model"


def test_what_no_file_says():
    config = changed(CONFIG)
    assert (config.is_encoder_decoder, config.is_decoder, config.architectures) == (False, False, None)
    assert (config.torch_dtype, config.dtype, config.name_or_path) == (None, None, "")
    assert config.use_return_dict is True
    assert config.get_text_config(decoder=True) is config
    assert config.to_dict() == CONFIG.to_dict()


def test_the_type_under_either_name():
    old, new = changed(CONFIG, torch_dtype="float16"), changed(CONFIG, dtype="float16")
    assert old.dtype == old.torch_dtype == new.dtype == new.torch_dtype == "float16"
    assert "dtype" not in old.to_dict()


def test_labels():
    config = changed(CONFIG, num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.num_labels = 2
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    assert changed(CONFIG, id2label={"0": "no", "1": "yes", "2": "?"}).num_labels == 3


def test_name():
    config = changed(CONFIG, _name_or_path="facebook/xglm-564M")
    assert config.name_or_path == "facebook/xglm-564M"
    config.name_or_path = "other"
    assert config.to_dict()["_name_or_path"] == "other"
    assert changed(CONFIG, name_or_path="x")._name_or_path == "x"


def test_update():
    config = changed(CONFIG)
    config.update({"hidden_size": 40, "task": "x"})
    assert (config.d_model, config.task) == (40, "x")
    with pytest.raises(ConfigError, match="d_model=41 is not a multiple"):
        config.update({"d_model": 41})


def test_differences():
    assert XGLMConfig(num_layers=3, task="x").to_diff_dict() == {"num_layers": 3, "task": "x", "model_type": "xglm"}


def test_files(tmp_path):
    CONFIG.to_json_file(tmp_path / "a.json")
    CONFIG.to_json_file(tmp_path / "b.json", use_diff=True)
    assert XGLMConfig.from_json_file(tmp_path / "a.json") == XGLMConfig.from_json_file(tmp_path / "b.json") == CONFIG
    assert json.loads((tmp_path / "b.json").read_text()) == CONFIG.to_diff_dict()
