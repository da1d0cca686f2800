import copy
import json
import math
import pickle

import pytest

from xglm_core import XGLMConfig
from xglm_core.config import ALIASES, CONFIG_FILE, PRESETS
from xglm_core.errors import ConfigError
from xglm_core.weight_names import num_parameters, weight_specs

# As documented for transformers v4.34.
DOCUMENTED = {
    "vocab_size": 256008,
    "max_position_embeddings": 2048,
    "d_model": 1024,
    "ffn_dim": 4096,
    "num_layers": 24,
    "attention_heads": 16,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
    "init_std": 0.02,
    "scale_embedding": True,
    "use_cache": True,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
# Those of transformers' `PretrainedConfig` that matter here.
INHERITED = {
    "tie_word_embeddings": True,
    "add_cross_attention": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "padding_rows": 0,
    "pruned_heads": {},
}

# config.json of facebook/xglm-564M; activation_dropout is an integer there.
PUBLISHED = {
    "activation_dropout": 0,
    "activation_function": "gelu",
    "architectures": ["XGLMForCausalLM"],
    "attention_dropout": 0.1,
    "attention_heads": 16,
    "bos_token_id": 0,
    "d_model": 1024,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "xglm",
    "num_layers": 24,
    "pad_token_id": 1,
    "scale_embedding": True,
    "transformers_version": "4.16.0.dev0",
    "use_cache": True,
    "vocab_size": 256008,
}


def write_config(folder, values):
    (folder / CONFIG_FILE).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


class TestDefaults:
    @pytest.mark.parametrize(("key", "value"), {**DOCUMENTED, **INHERITED}.items())
    def test_default(self, key, value):
        assert getattr(XGLMConfig(), key) == value
        assert type(getattr(XGLMConfig(), key)) is type(value)

    def test_no_other_keys(self):
        assert XGLMConfig().to_dict() == {**DOCUMENTED, **INHERITED, "model_type": "xglm"}

    def test_positional_order_is_the_documented_one(self):
        changed = [131, 61, 36, 53, 3, 6, "relu", 0.2, 0.3, 0.4, 0.5, 0.01, False, False, 5, 6, 7, 8]
        config = XGLMConfig(*changed)
        assert [getattr(config, key) for key in DOCUMENTED] == changed

    def test_membership(self):
        config = XGLMConfig(torch_dtype="float16")
        assert "d_model" in config
        assert "hidden_size" in config
        assert "torch_dtype" in config
        assert "text_config" not in config

    def test_pruned_heads(self):
        config = XGLMConfig(d_model=60, attention_heads=5, pruned_heads={"7": (3, 1, 1), 2: []})
        assert config.pruned_heads == {7: [1, 3]}
        assert config.kept_heads(7) == [0, 2, 4]
        assert config.kept_heads(2) == [0, 1, 2, 3, 4]
        assert XGLMConfig.from_dict(json.loads(config.to_json_string())) == config

    def test_derived(self):
        assert XGLMConfig(d_model=60, attention_heads=5).head_dim == 12
        assert XGLMConfig(eos_token_id=None).eos_token_ids == ()
        assert XGLMConfig(eos_token_id=7).eos_token_ids == (7,)
        assert XGLMConfig(eos_token_id=[7, 9]).eos_token_ids == (7, 9)


class TestAliases:
    @pytest.mark.parametrize(("alias", "key"), ALIASES.items())
    def test_both_directions(self, alias, key):
        config = XGLMConfig(**{alias: 32})
        assert getattr(config, key) == getattr(config, alias) == 32
        setattr(config, alias, 64)
        assert getattr(config, key) == 64
        setattr(config, key, 128)
        assert getattr(config, alias) == 128
        assert alias not in config.to_dict()

    def test_the_documented_ones(self):
        assert ALIASES["hidden_size"] == "d_model"
        assert ALIASES["num_attention_heads"] == "attention_heads"
        assert ALIASES["num_hidden_layers"] == ALIASES["n_layers"] == "num_layers"

    @pytest.mark.parametrize(("alias", "key"), ALIASES.items())
    def test_agreeing_values(self, alias, key):
        assert getattr(XGLMConfig(**{alias: 32, key: 32}), key) == 32

    @pytest.mark.parametrize(("alias", "key"), ALIASES.items())
    def test_contradiction(self, alias, key):
        with pytest.raises(ConfigError, match=f"{alias}=64 contradicts {key}=32; give one of the two"):
            XGLMConfig(**{alias: 64, key: 32})

    def test_two_aliases_of_one_key(self):
        with pytest.raises(ConfigError, match="n_layers=4 contradicts num_layers=3"):
            XGLMConfig(num_hidden_layers=3, n_layers=4)

    @pytest.mark.parametrize(("alias", "key"), ALIASES.items())
    def test_contradiction_of_a_value_that_is_the_default(self, alias, key, tmp_path):
        values = {alias: 64, key: DOCUMENTED[key]}
        with pytest.raises(ConfigError, match=f"{alias}=64 contradicts {key}={DOCUMENTED[key]}"):
            XGLMConfig.from_dict(values)
        write_config(tmp_path, values)
        with pytest.raises(ConfigError, match=f"{CONFIG_FILE}: config: {alias}=64 contradicts"):
            XGLMConfig.from_pretrained(tmp_path)

    def test_unknown_attribute(self):
        with pytest.raises(AttributeError, match="XGLMConfig has no attribute 'hidden'"):
            _ = XGLMConfig().hidden


class TestFiles:
    def test_published_file(self, tmp_path):
        write_config(tmp_path, PUBLISHED)
        config = XGLMConfig.from_pretrained(tmp_path)
        assert config.to_dict() == {**PUBLISHED, **INHERITED}
        assert config.activation_dropout == 0.0
        assert type(config.activation_dropout) is float

    def test_file_of_4_5b(self, tmp_path):
        sizes = {"d_model": 2048, "ffn_dim": 16384, "num_layers": 48, "activation_function": "relu"}
        write_config(tmp_path, {**PUBLISHED, **sizes, "activation_dropout": 0.0, "torch_dtype": "float16"})
        config = XGLMConfig.from_pretrained(tmp_path)
        assert config.torch_dtype == "float16"
        assert {key: getattr(config, key) for key in sizes} == sizes
        extra = {"architectures": ["XGLMForCausalLM"], "transformers_version": "4.16.0.dev0", "torch_dtype": "float16"}
        assert config == XGLMConfig.from_preset("4.5B", **extra)

    def test_round_trip_keeps_unknown_keys(self, tmp_path):
        unknown = {"newlinemode": "s", "head_dim": 64, "self": 1, "nested": {"a": [1, None, {"b": "ü\n"}]}, "no": None}
        config = XGLMConfig(eos_token_id=[2, 5], bos_token_id=None, **copy.deepcopy(unknown))
        config.save_pretrained(tmp_path / "new" / "folder")
        again = XGLMConfig.from_pretrained(tmp_path / "new" / "folder")
        assert again == config
        assert {key: again.to_dict()[key] for key in unknown} == unknown
        assert again.newlinemode == "s"

    def test_saved_file_is_sorted_json_with_every_key(self, tmp_path):
        XGLMConfig().save_pretrained(tmp_path)
        text = (tmp_path / CONFIG_FILE).read_text(encoding="utf-8")
        assert text == XGLMConfig().to_json_string()
        assert text.endswith("}\n")
        pairs = json.loads(text, object_pairs_hook=list)
        assert [key for key, _ in pairs] == sorted(XGLMConfig().to_dict())

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            '{"d_model": 1024',
            "\ufeff{}",
            "[" * 100_000,
            '{"d_model": ' + "1" * 5000 + "}",
        ],
        ids=["empty", "brace", "truncated", "byte order mark", "deep", "long number"],
    )
    def test_not_json(self, tmp_path, text):
        write_config(tmp_path, text)
        with pytest.raises(
            ConfigError, match=r"config\.json: expected a JSON object, but it cannot be read: "
        ) as error:
            XGLMConfig.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)

    def test_deep_json(self, tmp_path):
        """What could be read but not copied is refused at once."""
        write_config(tmp_path, '{"deep": %s}' % ("[" * 100 + "]" * 100))
        assert XGLMConfig.from_pretrained(tmp_path).to_json_string().count("[") == 100
        write_config(tmp_path, '{"deep": %s}' % ("[" * 900 + "]" * 900))
        with pytest.raises(ConfigError, match=r"config\.json: .*recursion"):
            XGLMConfig.from_pretrained(tmp_path)

    def test_not_utf8(self, tmp_path):
        (tmp_path / CONFIG_FILE).write_bytes(b'{"a": "\xff"}')
        with pytest.raises(ConfigError, match=r"config\.json: .* 0xff"):
            XGLMConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ('"x"', "str"), ("null", "NoneType")])
    def test_json_of_another_kind(self, tmp_path, text, kind):
        write_config(tmp_path, text)
        with pytest.raises(ConfigError, match=f"config.json: expected a JSON object, found a {kind}"):
            XGLMConfig.from_pretrained(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(ConfigError, match=r"config\.json: .*No such file"):
            XGLMConfig.from_pretrained(tmp_path)

    def test_other_model(self, tmp_path):
        write_config(tmp_path, {"model_type": "gpt2"})
        with pytest.raises(ConfigError, match=r"config\.json: config: model_type is 'gpt2', expected 'xglm'"):
            XGLMConfig.from_pretrained(tmp_path)

    def test_impossible_value_names_the_file(self, tmp_path):
        write_config(tmp_path, {**PUBLISHED, "num_layers": 0})
        with pytest.raises(ConfigError, match=r"config\.json: config: num_layers is 0, expected a positive integer"):
            XGLMConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize("key", ["to_dict", "validate", "from_pretrained", "__init__"])
    def test_key_named_like_a_method(self, key, tmp_path):
        write_config(tmp_path, {key: 1})
        with pytest.raises(ConfigError, match=f"the key '{key}' is the name of a method"):
            XGLMConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"activation_function": math.tanh}, "activation_function is a callable"),
            ({"torch_dtype": object()}, "cannot be saved as JSON: .*object"),
        ],
    )
    def test_what_json_cannot_hold(self, tmp_path, values, reason):
        with pytest.raises(ConfigError, match=reason):
            XGLMConfig(**values).save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []


COUNTS = ["vocab_size", "max_position_embeddings", "d_model", "ffn_dim", "num_layers", "attention_heads"]
PROBABILITIES = ["dropout", "attention_dropout", "activation_dropout", "layerdrop"]
FLAGS = [key for key, value in {**DOCUMENTED, **INHERITED}.items() if isinstance(value, bool)]
NOT_NUMBERS = [None, "1", True, [1], {}, math.nan]


class TestImpossibleValues:
    @pytest.mark.parametrize("key", COUNTS)
    @pytest.mark.parametrize("value", [0, -1, 16.0, math.inf, *NOT_NUMBERS])
    def test_counts(self, key, value):
        with pytest.raises(ConfigError, match=f"{key} is .*, expected a positive integer"):
            XGLMConfig(**{key: value})

    @pytest.mark.parametrize("key", PROBABILITIES)
    @pytest.mark.parametrize("value", [-0.1, 1.001, 2, -1, math.inf, 10**400, *NOT_NUMBERS])
    def test_probabilities(self, key, value):
        with pytest.raises(ConfigError, match=f"{key} is .*, expected a probability between 0 and 1"):
            XGLMConfig(**{key: value})

    @pytest.mark.parametrize("value", [-0.1, -1, math.inf, 10**400, *NOT_NUMBERS])
    def test_init_std(self, value):
        with pytest.raises(ConfigError, match=r"init_std is .*, expected a finite number that is not negative"):
            XGLMConfig(init_std=value)

    @pytest.mark.parametrize("key", FLAGS)
    @pytest.mark.parametrize("value", [0, 1, None, "true"])
    def test_flags(self, key, value):
        with pytest.raises(ConfigError, match=f"{key} is .*, expected true or false"):
            XGLMConfig(**{key: value})

    @pytest.mark.parametrize("key", ["decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"])
    @pytest.mark.parametrize("value", [-1, 1.0, True, "2"])
    def test_token_ids(self, key, value):
        with pytest.raises(ConfigError, match=f"{key} is .*, expected a token id"):
            XGLMConfig(**{key: value})

    @pytest.mark.parametrize("value", [[2, -1], [None], [[2]], [True]])
    def test_eos_list(self, value):
        with pytest.raises(ConfigError, match=r"eos_token_id is \[.*\], expected a token id, a list of them, or null"):
            XGLMConfig(eos_token_id=value)

    def test_padding_outside_the_vocabulary(self):
        with pytest.raises(ConfigError, match="pad_token_id is 131, expected an id below vocab_size=131"):
            XGLMConfig(vocab_size=131, pad_token_id=131)
        assert XGLMConfig(vocab_size=131, pad_token_id=130).pad_token_id == 130

    def test_heads_share_the_width(self):
        with pytest.raises(ConfigError, match="d_model=34 is not a multiple of attention_heads=5"):
            XGLMConfig(d_model=34, attention_heads=5)

    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_too_narrow_for_positions(self, width):
        with pytest.raises(ConfigError, match=f"d_model is {width}, expected at least 4"):
            XGLMConfig(d_model=width, attention_heads=1)
        assert XGLMConfig(d_model=4, attention_heads=1).d_model == 4

    @pytest.mark.parametrize("value", ["swish", "GELU", "", None, 3, ["gelu"]])
    def test_activation(self, value):
        with pytest.raises(ConfigError, match=r"activation_function is .*, expected one of gelu, relu, silu, gelu_new"):
            XGLMConfig(activation_function=value)

    @pytest.mark.parametrize("value", ["gelu", "relu", "silu", "gelu_new", math.tanh])
    def test_possible_activations(self, value):
        assert XGLMConfig(activation_function=value).activation_function is value

    @pytest.mark.parametrize("value", [[1], {"x": [1]}, {0: 1}, {0: ["a"]}, {0: [1.5]}, "12"])
    def test_pruned_heads_of_another_kind(self, value):
        with pytest.raises(
            ConfigError, match=r"pruned_heads is .*, expected lists of heads by the index of their block"
        ):
            XGLMConfig(pruned_heads=value)

    @pytest.mark.parametrize("block", [-1, 24])
    def test_pruned_heads_of_no_block(self, block):
        with pytest.raises(ConfigError, match=rf"pruned_heads names block {block}, expected 0 to 23"):
            XGLMConfig(pruned_heads={block: [0]})

    @pytest.mark.parametrize("heads", [[16], [-1], list(range(16))])
    def test_pruned_heads_that_are_none_or_all(self, heads):
        with pytest.raises(ConfigError, match=r"block 3 is .*, expected some of 0 to 15, but not all of them"):
            XGLMConfig(pruned_heads={3: heads})

    @pytest.mark.parametrize("key", PROBABILITIES)
    @pytest.mark.parametrize("value", [0, 1, 0.0, 1.0])
    def test_ends_of_the_range(self, key, value):
        stored = getattr(XGLMConfig(**{key: value}), key)
        assert stored == value
        assert type(stored) is float

    def test_no_special_ids(self):
        ids = dict.fromkeys(["decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"])
        assert XGLMConfig.from_dict(XGLMConfig(**ids).to_dict()) == XGLMConfig(**ids)


class TestPresets:
    @pytest.mark.parametrize(
        ("size", "parameters", "tensors"),
        [
            ("564M", 564_463_616, 387),
            ("1.7B", 1_732_907_008, 387),
            ("2.9B", 2_941_505_536, 771),
            ("4.5B", 4_552_511_488, 771),
            ("7.5B", 7_492_771_840, 515),
        ],
    )
    def test_public_figures(self, size, parameters, tensors):
        config = XGLMConfig.from_preset(size)
        assert num_parameters(config) == parameters
        assert len(weight_specs(config, with_head=False)) == tensors
        untied = XGLMConfig.from_preset(size, tie_word_embeddings=False)
        assert num_parameters(untied) == parameters + 256008 * config.d_model

    def test_all_are_tested(self):
        assert list(PRESETS) == ["564M", "1.7B", "2.9B", "4.5B", "7.5B"]

    def test_overrides_by_either_name(self):
        assert XGLMConfig.from_preset("1.7B", num_layers=2).num_layers == 2
        assert XGLMConfig.from_preset("1.7B", hidden_size=512).d_model == 512
        assert XGLMConfig.from_preset("1.7B").d_model == 2048

    def test_unknown(self):
        with pytest.raises(ConfigError, match=r"no preset '600M'; the published sizes are 564M, 1\.7B, 2\.9B"):
            XGLMConfig.from_preset("600M")


class TestValueSemantics:
    def test_equality(self):
        assert XGLMConfig() == XGLMConfig()
        assert XGLMConfig() != XGLMConfig(use_cache=False)
        assert XGLMConfig() != XGLMConfig(newlinemode="s")
        assert XGLMConfig() != XGLMConfig().to_dict()

    def test_not_hashable(self):
        with pytest.raises(TypeError, match="unhashable"):
            hash(XGLMConfig())

    def test_repr_is_the_constructor_call(self):
        config = XGLMConfig(vocab_size=131, eos_token_id=[2, 3], newlinemode="s")
        assert eval(repr(config), {"XGLMConfig": XGLMConfig}) == config

    @pytest.mark.parametrize(
        "copied",
        [
            copy.copy,
            copy.deepcopy,
            lambda c: pickle.loads(pickle.dumps(c)),
            lambda c: XGLMConfig.from_dict(c.to_dict()),
        ],
        ids=["copy", "deepcopy", "pickle", "dict"],
    )
    def test_copies(self, copied):
        config = XGLMConfig(vocab_size=131, newlinemode="s", head_dim=3, nested={"a": [1]})
        again = copied(config)
        assert again == config
        again.num_layers = 2
        assert config.num_layers == 24

    def test_to_dict_shares_nothing(self):
        config = XGLMConfig(eos_token_id=[2, 3], nested={"a": [1]})
        values = config.to_dict()
        values["eos_token_id"].append(4)
        values["nested"]["a"].append(2)
        values["d_model"] = 7
        assert config == XGLMConfig(eos_token_id=[2, 3], nested={"a": [1]})

    def test_from_dict_shares_nothing(self):
        values = {"eos_token_id": [2, 3], "nested": {"a": [1]}}
        before = copy.deepcopy(values)
        config = XGLMConfig.from_dict(values)
        config.nested["a"].append(2)
        config.eos_token_id.append(4)
        assert values == before
