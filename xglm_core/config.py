"""`XGLMConfig`: the architecture of one XGLM checkpoint, and the five published sizes."""

from __future__ import annotations

import copy
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from xglm_core.errors import ConfigError, InputError
from xglm_core.files import replacing
from xglm_core.hub import find_source
from xglm_core.keywords import UPLOAD, split_options, writes
from xglm_core.python_values import plain

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

LAYER_NORM_EPS = 1e-5  # Not a key of config.json: fairseq and every published port use PyTorch's default.

ACTIVATIONS = ("gelu", "relu", "silu", "gelu_new")

ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "attention_heads",
    "num_hidden_layers": "num_layers",
    "n_layers": "num_layers",
}

# Defaults for what libraries ask of any transformers configuration.
_ELSEWHERE: dict[str, Any] = {
    "_name_or_path": "",
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "dtype": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "num_labels": 2,
    "problem_type": None,
    "tokenizer_class": None,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": None,
}

# Differences from the defaults of `XGLMConfig`, which are those of the 564M model.
# 4.5B is the odd one out: ReLU and a feed-forward width of 8 x d_model (config.json of facebook/xglm-4.5B).
PRESETS: dict[str, dict[str, Any]] = {
    "564M": {},
    "1.7B": {"d_model": 2048, "ffn_dim": 8192},
    "2.9B": {"d_model": 2048, "ffn_dim": 8192, "num_layers": 48},
    "4.5B": {"d_model": 2048, "ffn_dim": 16384, "num_layers": 48, "activation_function": "relu"},
    "7.5B": {"d_model": 4096, "ffn_dim": 16384, "num_layers": 32, "attention_heads": 32},
}

_COUNTS = ("vocab_size", "max_position_embeddings", "d_model", "ffn_dim", "num_layers", "attention_heads")
_PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")
_FLAGS = (
    "scale_embedding",
    "use_cache",
    "tie_word_embeddings",
    "add_cross_attention",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
_TOKEN_IDS = ("decoder_start_token_id", "pad_token_id", "bos_token_id")


class XGLMConfig:
    """Sizes and switches of one model; the keys of the published `config.json`.

    Args:
        vocab_size: rows of the embedding matrix, in tokens.
        max_position_embeddings: longest sequence, in tokens. The position table is computed, so any value is valid.
        d_model: width of the residual stream (alias `hidden_size`); at least 4, a multiple of `attention_heads`.
        ffn_dim: width of the feed-forward layer.
        num_layers: decoder blocks (aliases `num_hidden_layers`, `n_layers`).
        attention_heads: heads per block (alias `num_attention_heads`).
        activation_function: "gelu" (exact, by erf), "relu", "silu", "gelu_new" (tanh), or a callable of the backend.
        dropout: drop probability of embeddings and of the output of each sub-layer, in [0, 1].
        attention_dropout: drop probability of the attention probabilities, in [0, 1].
        activation_dropout: drop probability inside the feed-forward layer, in [0, 1].
        layerdrop: probability to skip a whole block while training, in [0, 1].
        init_std: standard deviation of freshly initialised matrices.
        scale_embedding: multiply token embeddings by sqrt(d_model).
        use_cache: whether a call returns its key/value cache by default.
        decoder_start_token_id, pad_token_id, bos_token_id: special ids, or None.
        eos_token_id: the id or the ids that end a text, or None. In this family `</s>` is also the newline.
        tie_word_embeddings: whether the head is the embedding matrix; False if the checkpoint stores another one.
        add_cross_attention: whether blocks also attend to encoder states, if a call has some.
        padding_rows: the number of last rows of the embedding matrix that stand for no token. They round its size up,
            and are never generated. See `resize_token_embeddings` of the model classes.
        pruned_heads: pruned self-attention heads, by the index of their block; see `prune_heads` of the model classes.
        output_attentions, output_hidden_states, return_dict: what a call returns by default.
        kwargs: any other key; it becomes an attribute and survives a round trip through JSON.

    Raises:
        ConfigError: a value has the wrong type or cannot describe a model; the message names the key and the reason.
    """

    model_type = "xglm"
    attribute_map = ALIASES
    keys_to_ignore_at_inference = ("past_key_values",)
    sub_configs: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        /,
        vocab_size: int = 256008,
        max_position_embeddings: int = 2048,
        d_model: int = 1024,
        ffn_dim: int = 4096,
        num_layers: int = 24,
        attention_heads: int = 16,
        activation_function: str | Callable[[Any], Any] = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        layerdrop: float = 0.0,
        init_std: float = 0.02,
        scale_embedding: bool = True,
        use_cache: bool = True,
        decoder_start_token_id: int | None = 2,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 2,
        *,
        tie_word_embeddings: bool = True,
        add_cross_attention: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        padding_rows: int = 0,
        pruned_heads: dict[int, list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.d_model = d_model
        self.ffn_dim = ffn_dim
        self.num_layers = num_layers
        self.attention_heads = attention_heads
        self.activation_function = activation_function
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.layerdrop = layerdrop
        self.init_std = init_std
        self.scale_embedding = scale_embedding
        self.use_cache = use_cache
        self.decoder_start_token_id = decoder_start_token_id
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.add_cross_attention = add_cross_attention
        self.output_attentions = output_attentions
        self.output_hidden_states = output_hidden_states
        self.return_dict = return_dict
        self.padding_rows = padding_rows
        self.pruned_heads = {} if pruned_heads is None else pruned_heads
        for key, value in kwargs.items():
            if key == "model_type":
                if value != self.model_type:
                    raise ConfigError(
                        f"config: model_type is {value!r}, expected 'xglm'; this package runs XGLM checkpoints only"
                    )
            elif key in ALIASES:
                self._set_alias(key, value)
            elif callable(getattr(type(self), key, None)):
                raise ConfigError(f"config: the key {key!r} is the name of a method of XGLMConfig; rename it")
            else:
                # `setattr` would fail for properties such as `head_dim`.
                vars(self)["_name_or_path" if key == "name_or_path" else key] = value
        self.validate()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.attention_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple: empty for None."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def others(self) -> dict[str, Any]:
        """The keys that are not arguments of the constructor."""
        return {name: value for name, value in vars(self).items() if name not in _DEFAULTS}

    def kept_heads(self, layer: int) -> list[int]:
        """The self-attention heads that a block still has, by their original index."""
        return [head for head in range(self.attention_heads) if head not in self.pruned_heads.get(layer, ())]

    # The aliases read and write the canonical attribute, so that the two can never disagree.
    def __getattr__(self, name: str) -> Any:
        match name:
            case _ if name in ALIASES:
                return getattr(self, ALIASES[name])
            case "dtype" | "torch_dtype":  # The same key, of newer and of older versions of transformers.
                return vars(self).get("torch_dtype" if name == "dtype" else "dtype")
            case "num_labels" if "id2label" in vars(self):
                return len(self.id2label)
            case "id2label":
                return {index: f"LABEL_{index}" for index in range(self.num_labels)}
            case "label2id":
                return {label: int(index) for index, label in self.id2label.items()}
            case "name_or_path":
                return self._name_or_path
            case "use_return_dict":
                return self.return_dict
            case _ if name in _ELSEWHERE:
                return _ELSEWHERE[name]
        raise AttributeError(f"XGLMConfig has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("_name_or_path" if name == "name_or_path" else ALIASES.get(name, name), value)

    def __contains__(self, key: object) -> bool:
        """Whether there is such a key."""
        return key in vars(self) or key in ALIASES

    def __eq__(self, other: object) -> bool:
        return isinstance(other, XGLMConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"XGLMConfig({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def _set_alias(self, alias: str, value: Any) -> None:
        """Applies an alias given to the constructor, unless it contradicts its canonical key.

        A canonical key at its default counts as not given, since the constructor cannot see the difference.
        """
        key = ALIASES[alias]
        current = getattr(self, key)
        if current not in (_DEFAULTS[key], value):
            raise _contradiction(alias, value, key, current)
        setattr(self, key, value)

    def validate(self) -> None:
        """Checks all values, as the constructor does. A model checks them again: they may have been changed.

        Raises:
            ConfigError: a value has the wrong type or cannot describe a model.
        """
        vars(self).update({key: plain(value) for key, value in vars(self).items()})
        for key in _COUNTS:
            value = getattr(self, key)
            if not _is_int(value) or value < 1:
                raise ConfigError(f"config: {key} is {value!r}, expected a positive integer")
        if not _is_int(self.padding_rows) or not 0 <= self.padding_rows < self.vocab_size:
            raise ConfigError(
                f"config: padding_rows is {self.padding_rows!r}, expected fewer than vocab_size={self.vocab_size}"
            )
        for key in _PROBABILITIES:
            value = getattr(self, key)
            if not _is_number(value, 1):
                raise ConfigError(f"config: {key} is {value!r}, expected a probability between 0 and 1")
            setattr(self, key, float(value))
        if not _is_number(self.init_std, sys.float_info.max):
            raise ConfigError(f"config: init_std is {self.init_std!r}, expected a finite number that is not negative")
        self.init_std = float(self.init_std)
        for key in _FLAGS:
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"config: {key} is {getattr(self, key)!r}, expected true or false")
        for key in _TOKEN_IDS:
            value = getattr(self, key)
            if value is not None and (not _is_int(value) or value < 0):
                raise ConfigError(f"config: {key} is {value!r}, expected a token id or null")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                f"config: pad_token_id is {self.pad_token_id}, expected an id below vocab_size={self.vocab_size}"
            )
        eos = self.eos_token_id
        if eos is not None and not all(_is_int(i) and i >= 0 for i in (eos if isinstance(eos, list) else [eos])):
            raise ConfigError(f"config: eos_token_id is {eos!r}, expected a token id, a list of them, or null")
        if self.d_model % self.attention_heads:
            raise ConfigError(
                f"config: d_model={self.d_model} is not a multiple of attention_heads={self.attention_heads}, "
                "so the heads cannot share the width equally"
            )
        self.pruned_heads = self._checked_pruned_heads()
        if self.d_model < 4:
            raise ConfigError(f"config: d_model is {self.d_model}, expected at least 4 (two sine frequencies)")
        if not callable(self.activation_function) and self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"config: activation_function is {self.activation_function!r}, "
                f"expected one of {', '.join(ACTIVATIONS)}, or a callable"
            )

    def _checked_pruned_heads(self) -> dict[int, list[int]]:
        """`pruned_heads` with integer keys; JSON turns keys into strings."""
        checked: dict[int, list[int]] = {}
        try:
            for layer, heads in dict(self.pruned_heads).items():
                checked[int(layer)] = sorted({operator.index(head) for head in heads})
        except (TypeError, ValueError):
            raise ConfigError(
                f"config: pruned_heads is {self.pruned_heads!r}, expected lists of heads by the index of their block"
            ) from None
        for layer, pruned in checked.items():
            if not 0 <= layer < self.num_layers:
                raise ConfigError(f"config: pruned_heads names block {layer}, expected 0 to {self.num_layers - 1}")
            outside = [head for head in pruned if not 0 <= head < self.attention_heads]
            if outside or len(pruned) == self.attention_heads:
                raise ConfigError(
                    f"config: pruned_heads of block {layer} is {pruned}, expected some of 0 to "
                    f"{self.attention_heads - 1}, but not all of them"
                )
        return {layer: pruned for layer, pruned in sorted(checked.items()) if pruned}

    @classmethod
    def from_preset(cls, size: str, **overrides: Any) -> XGLMConfig:
        """The configuration of a published size: "564M", "1.7B", "2.9B", "4.5B" or "7.5B".

        Raises:
            ConfigError: `size` is not one of them.
        """
        if size not in PRESETS:
            raise ConfigError(f"config: no preset {size!r}; the published sizes are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[size], **{ALIASES.get(key, key): value for key, value in overrides.items()}})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> XGLMConfig:
        """The configuration that `to_dict` wrote; `values` is not modified.

        Raises:
            ConfigError: a value is impossible, or an alias contradicts its canonical key.
        """
        for alias, key in ALIASES.items():
            if alias in values and key in values and values[alias] != values[key]:
                raise _contradiction(alias, values[alias], key, values[key])
        return cls(**copy.deepcopy(values))

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> XGLMConfig:
        """Reads a `config.json`.

        Raises:
            ConfigError: the file cannot be read, is not a JSON object, or does not describe an XGLM model.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: expected a JSON object, but it cannot be read: {_one_line(error)}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, found a {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except (ConfigError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def of(cls, given: Any) -> XGLMConfig:
        """The configuration for an `XGLMConfig`, a path of its file or folder, or an object of transformers.

        Raises:
            ConfigError: it does not describe an XGLM model.
            InputError: it is none of these.
        """
        if isinstance(given, XGLMConfig):
            return given
        if isinstance(given, str | os.PathLike):
            return cls.from_json_file(given) if os.path.isfile(given) else cls.from_pretrained(given)
        if not hasattr(given, "to_dict"):
            raise InputError(
                f"config is a {type(given).__name__}, expected an XGLMConfig, or the folder of config.json"
            )
        return cls.from_dict(given.to_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> XGLMConfig:
        """Reads `config.json` from a checkpoint folder, or from a repository of the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder, or the id of the repository.
            options: see `HubOptions`; and values of the configuration to replace. With `return_unused_kwargs=True`, the
                result is the configuration and a dictionary of all other options.

        Raises:
            ConfigError: the file cannot be read, is not a JSON object, or does not describe an XGLM model.
            InputError: an option is unknown.
            CheckpointError: there is no such folder, or the file cannot be downloaded.
            BackendError: the hub needs a package that is not installed.
        """
        wants_unused = options.pop("return_unused_kwargs", False)
        hub, values = split_options(options)
        source = find_source(pretrained_model_name_or_path, **hub)
        config = cls.from_json_file(source.fetch([CONFIG_FILE]) / CONFIG_FILE)
        unused = {key: values.pop(key) for key in [*values] if wants_unused and not config.has_key(key)}
        config = config.with_values(values)
        return (config, unused) if wants_unused else config  # type: ignore[return-value]  # Few ask for it.

    def has_key(self, key: str) -> bool:
        """Whether the configuration has a key, or any `config.json` may have it."""
        return key in self or key in _ELSEWHERE or key in ("id2label", "label2id", "name_or_path")

    def check_keys(self, keys: Iterable[str]) -> None:
        """Raises `InputError` for unknown keys."""
        if unknown := [key for key in keys if not self.has_key(key)]:
            raise InputError(f"{', '.join(unknown)}: no option of from_pretrained, nor a key of the configuration")

    def with_values(self, values: Mapping[str, Any]) -> XGLMConfig:
        """A copy with other values, by their keys or aliases.

        Raises:
            ConfigError: a value is impossible.
            InputError: there is no such key.
        """
        self.check_keys(values)
        return type(self).from_dict(
            {**self.to_dict(), **{ALIASES.get(key, key): value for key, value in values.items()}}
        )

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets values, by their keys or aliases; other keys are added.

        Raises:
            ConfigError: a value is impossible.
        """
        for key, value in values.items():
            setattr(self, key, value)
        self.validate()

    def to_dict(self) -> dict[str, Any]:
        """All keys with their values, as plain Python objects that share nothing with this configuration."""
        return copy.deepcopy({**vars(self), "model_type": self.model_type})

    def to_diff_dict(self) -> dict[str, Any]:
        """The keys of `to_dict` whose values are not the default, and `model_type`."""
        return {k: v for k, v in self.to_dict().items() if k not in _DEFAULTS or v != _DEFAULTS[k]}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> XGLMConfig:
        """This configuration; `decoder` and `encoder` have no effect."""
        return self

    def to_json_string(self, use_diff: bool = False) -> str:
        """`to_dict`, or `to_diff_dict` if `use_diff`, as JSON with sorted keys.

        Raises:
            ConfigError: JSON cannot hold a value, such as a callable activation.
        """
        if callable(self.activation_function):
            raise ConfigError("config: activation_function is a callable, which config.json cannot hold; name it")
        try:
            return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config: a value cannot be saved as JSON: {_one_line(error)}") from None

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = False) -> None:
        """Writes `to_json_string` into a file.

        Raises:
            ConfigError: see `to_json_string`.
        """
        text = self.to_json_string(use_diff)
        with replacing(json_file_path) as file:
            file.write(text.encode())

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes `config.json` into a folder, which is created if it is missing.

        Raises:
            ConfigError: see `to_json_string`.
            InputError: an option is not offered, such as `push_to_hub`.
        """
        if writes(options):
            text = self.to_json_string()
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            with replacing(Path(save_directory) / CONFIG_FILE) as file:
                file.write(text.encode())

    def push_to_hub(self, *args: Any, **options: Any) -> None:
        """Is not offered.

        Raises:
            InputError: says what to do instead.
        """
        raise InputError(f"push_to_hub is not offered here; {UPLOAD}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object, highest: float) -> bool:
    """Whether `value` is a number from 0 to `highest`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= highest


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _contradiction(alias: str, value: object, key: str, other: object) -> ConfigError:
    return ConfigError(f"config: {alias}={value!r} contradicts {key}={other!r}; give one of the two")


_DEFAULTS = vars(XGLMConfig())
