"""`GenerationConfig`: the options of `generate`, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xglm_core.config import GENERATION_CONFIG_FILE, XGLMConfig
from xglm_core.errors import ConfigError, InputError
from xglm_core.files import replacing
from xglm_core.hub import find_source
from xglm_core.keywords import split_options, writes
from xglm_core.python_values import plain

_DEFAULT_NEW_TOKENS = 20
_PUBLISHED_VOCABULARY = 256_008
_OLD_MAX_LENGTH = 20  # A default in old config.json files, which nobody chose.
_MADEUP_WORDS = 7  # The last ids of the published vocabulary, which no text contains.

_AS_FUNCTION = "write it as a function for logits_processor"
_FEW_BEAMS = "take num_beams with num_return_sequences, or do_sample=True"
_SAME_TEXT = "the text is the same without it"
_AFTERWARDS = "call the model with the sequences that come out, and with this option"

# Options of transformers that would change the result, and are not offered here: the value, beside None and False, at
# which they have no effect, and what to do instead.
NOT_OFFERED: dict[str, tuple[Any, str]] = {
    "assistant_model": (None, _SAME_TEXT),
    "constraints": (None, "take prefix_allowed_tokens_fn"),
    "custom_generate": (None, "write the loop with the model's own calls"),
    "diversity_penalty": (0, _FEW_BEAMS),
    "dola_layers": (None, _AS_FUNCTION),
    "encoder_no_repeat_ngram_size": (0, "take no_repeat_ngram_size, which counts the prompt, too"),
    "encoder_repetition_penalty": (1, _AS_FUNCTION),
    "epsilon_cutoff": (0, "take min_p or typical_p"),
    "eta_cutoff": (0, "take min_p or typical_p"),
    "exponential_decay_length_penalty": (None, _AS_FUNCTION),
    "force_words_ids": (None, "take prefix_allowed_tokens_fn, or sequence_bias for the words"),
    "guidance_scale": (1, _AS_FUNCTION),
    "negative_prompt_attention_mask": (None, _AS_FUNCTION),
    "negative_prompt_ids": (None, _AS_FUNCTION),
    "num_beam_groups": (1, _FEW_BEAMS),
    "output_attentions": (None, _AFTERWARDS),
    "output_hidden_states": (None, _AFTERWARDS),
    "penalty_alpha": (0, "take do_sample=True or num_beams"),
    "position_ids": (None, "positions follow attention_mask"),
    "prompt_lookup_num_tokens": (None, _SAME_TEXT),
    "remove_invalid_values": (None, "NaN in logits is an error; replace it by a logits_processor"),
    "token_healing": (None, "leave the last token away from the prompt, and allow what begins with it"),
    "top_h": (None, "take top_p or min_p"),
    "watermarking_config": (None, _AS_FUNCTION),
}

# Options of transformers that do not change the result, or belong to options that are not offered.
_HOW = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bos_token_id
    cache_config cache_implementation compile_config continuous_batching_config decoder_start_token_id disable_compile
    is_assistant low_memory max_cache_len max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    prefill_chunk_size return_legacy_cache speculation_type synced_gpus target_lookbehind use_model_defaults use_mtp
"""
WITHOUT_EFFECT = frozenset(_HOW.split())


def not_offered(options: Mapping[str, Any]) -> dict[str, str]:
    """The given options that would have an effect in transformers but are not offered here, with advice."""

    def acts(name: str, value: Any) -> bool:
        off = value is None or value is False or (isinstance(value, numbers.Number) and value == NOT_OFFERED[name][0])
        return not off

    return {name: NOT_OFFERED[name][1] for name, value in options.items() if name in NOT_OFFERED and acts(name, value)}


@dataclass
class GenerationConfig:
    """How to continue a text. The names and defaults are those of transformers where it has the option.

    Attributes:
        max_new_tokens: the largest number of new tokens in each row; None follows `max_length`, or means 20 without it.
        max_length: the largest number of columns of the result, including prompt and padding.
        min_new_tokens: the number of new tokens before which no row ends.
        min_length: the number of columns, including prompt and padding, before which no row ends.
        max_time: the time [s] after which no further token is begun; None means no limit.
        eos_token_id: the id, or several ids, that end a row.
        stop_at_eos: False goes on after `eos_token_id`, which is also XGLM's line break.
        stop_strings: a string, or several, that end a row when they appear in the new text; needs a tokenizer.
        pad_token_id: the id that fills a row after its end.
        do_sample: whether to sample tokens by their probabilities; otherwise the likeliest one is taken.
        temperature: the divisor of the logits before sampling; below 1 is more cautious.
        top_k: samples from so many likeliest tokens; 0 means all.
        top_p: samples from the likeliest tokens that together have this probability.
        min_p: samples from tokens with at least this fraction of the largest probability; None means all.
        typical_p: samples from the tokens whose information is closest to the expected one, and that together have this
            probability.
        seed: the seed of sampling; the same seed gives the same texts. None draws a seed.
        num_beams: the number of beams; 1 means no beam search.
        length_penalty: a finished beam's log-probability is divided by its length to this power.
        early_stopping: True ends the search when there are `num_beams` finished beams, False when no better one is
            likely, "never" when no better one is possible.
        num_return_sequences: continuations of each prompt; their rows follow each other.
        repetition_penalty: tokens that the text contains become less likely by this factor; 1 has no effect.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0 has no effect.
        bad_words_ids: sequences of ids that are not generated.
        suppress_tokens: ids that are not generated; for the published vocabulary, the seven made-up words.
        begin_suppress_tokens: ids that are not the first new token, or the first after `forced_bos_token_id`.
        sequence_bias: a bias for the score of the last id of a sequence, where the text ends with the others: a
            dictionary of biases by tuples of ids, or a list of pairs of a list of ids and a bias.
        forced_bos_token_id: the first new token.
        forced_eos_token_id: the id, or several ids, of which a row gets one in its last column if it has not ended.
        renormalize_logits: whether scores become log-probabilities again after all bans and limits.
        return_dict_in_generate: whether to return a `GenerateOutput` instead of only the ids.
        output_scores, output_logits: whether the output has the scores and logits of each step, which take memory.
        use_cache: whether the output has the cache. Generation always uses one.
        other: further keys of `generation_config.json`, kept for saving.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    max_time: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_at_eos: bool = True
    stop_strings: str | Sequence[str] | None = None
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    sequence_bias: Mapping[Sequence[int], float] | Sequence[Sequence[Any]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    renormalize_logits: bool = False
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    use_cache: bool = True
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_model(cls, config: XGLMConfig, folder: str | os.PathLike[str] | None = None) -> GenerationConfig:
        """The options for a model: its special ids, and what `generation_config.json` in `folder` says.

        Without that file, options in the model's own configuration count; old checkpoints have them there.

        Raises:
            ConfigError: see `from_pretrained`.
        """
        options: dict[str, Any] = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        if config.vocab_size - config.padding_rows == _PUBLISHED_VOCABULARY:
            options["suppress_tokens"] = list(range(_PUBLISHED_VOCABULARY - _MADEUP_WORDS, _PUBLISHED_VOCABULARY))
        if folder is not None and (Path(folder) / GENERATION_CONFIG_FILE).is_file():
            options |= _read(Path(folder) / GENERATION_CONFIG_FILE)
        else:
            names = {item.name for item in dataclasses.fields(cls)} | {*NOT_OFFERED}
            options |= {name: value for name, value in config.others.items() if name in names and value is not None}
            if options.get("max_length") == _OLD_MAX_LENGTH:
                del options["max_length"]
        return cls.from_dict(options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        config_file_name: str | None = None,
        **options: Any,
    ) -> GenerationConfig:
        """Reads `generation_config.json` from a folder, or from a repository of the Hugging Face Hub.

        Args:
            pretrained_model_name: the folder, or the id of the repository.
            config_file_name: another name of the file.
            options: see `HubOptions`; and options of generation to replace.

        Raises:
            ConfigError: the file is missing or is not a JSON object.
            CheckpointError: there is no such folder, or the file cannot be downloaded.
            BackendError: the hub needs a package that is not installed.
        """
        hub, values = split_options(options)
        name = config_file_name or GENERATION_CONFIG_FILE
        result = cls.from_dict({**_read(find_source(pretrained_model_name, **hub).fetch([name]) / name), **values})
        result.warn_of_others()
        return result

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenerationConfig:
        """Reads options from a dictionary; None means the default, and unknown keys are kept in `other`."""
        known = {item.name for item in dataclasses.fields(cls)} - {"other"}
        options = {name: value for name, value in values.items() if name in known and value is not None}
        return cls(**options, other={name: value for name, value in values.items() if name not in known})

    def warn_of_others(self) -> None:
        """Warns of keys in the file that change the text in transformers but have no effect here."""
        found = {k: v for k, v in not_offered(self.other).items() if v not in (_SAME_TEXT, _AFTERWARDS)}
        if found:
            ways = "; ".join(f"{name}: {instead}" for name, instead in found.items())
            warnings.warn(
                f"{GENERATION_CONFIG_FILE} (or an old config.json) has {', '.join(found)}, which generate does not "
                f"offer and leaves out ({ways})",
                stacklevel=2,
            )

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, and `other`."""
        defaults = GenerationConfig()
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "other"}
        if isinstance(self.sequence_bias, Mapping):  # JSON has no such keys.
            values["sequence_bias"] = [[list(word), bias] for word, bias in self.sequence_bias.items()]
        return self.other | {name: value for name, value in values.items() if value != getattr(defaults, name)}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], config_file_name: str | None = None, **options: Any
    ) -> None:
        """Writes `generation_config.json`, or a file of another name, into a folder, created if it is missing.

        Raises:
            InputError: an option is not offered, such as `push_to_hub`.
        """
        if not writes(options):
            return
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with replacing(Path(save_directory) / (config_file_name or GENERATION_CONFIG_FILE)) as file:
            file.write((json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n").encode())

    def updated(self, options: dict[str, Any]) -> GenerationConfig:
        """A copy with the options of a call. As in transformers, None switches an option off.

        Raises:
            InputError: an option is unknown, has an impossible value, or contradicts another one.
        """
        options = plain(options)
        known = {item.name for item in dataclasses.fields(self)} - {"other"}
        for name, instead in not_offered(options).items():
            raise InputError(f"{name} is not offered here; {instead}")
        options = {k: v for k, v in options.items() if k not in NOT_OFFERED and k not in WITHOUT_EFFECT}
        for name in options:
            if name not in known:
                raise InputError(f"{name} is not an option of generate; expected some of {', '.join(sorted(known))}")
        values: dict[str, Any] = {k: _OFF.get(k) if v is None else v for k, v in options.items()}
        result = dataclasses.replace(self, **values)
        if options.get("max_length") is not None:
            if options.get("max_new_tokens") is not None:
                raise InputError("max_length and max_new_tokens are both given, expected one of the two")
            result.max_new_tokens = None
        result.check()
        _check_effects(result, {name: value for name, value in options.items() if value is not None})
        return result

    def over(self, base: GenerationConfig) -> GenerationConfig:
        """A copy in which options that are None are taken from another configuration."""
        unset = {item.name for item in dataclasses.fields(self) if getattr(self, item.name) is None}
        if self.max_length is not None:  # An inherited `max_new_tokens` would override it.
            unset -= {"max_new_tokens"}
        return dataclasses.replace(self, **{name: getattr(base, name) for name in unset})

    def check(self) -> None:
        """Checks each option by itself.

        Raises:
            InputError: an option has an impossible value.
        """
        for name, (allowed, expected) in _ALLOWED.items():
            value = getattr(self, name)
            if name in FOR_SAMPLING and not self.do_sample:
                continue  # As in transformers: a file may have temperature 0 without sampling.
            if not allowed(value):
                raise InputError(f"{name} is {value!r}, expected {expected}")
        if self.min_new_tokens > (self.max_new_tokens or self.min_new_tokens):
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens}, expected at most max_new_tokens={self.max_new_tokens}"
            )
        if self.max_new_tokens is None and self.min_length > (self.max_length or self.min_length):
            raise InputError(f"min_length is {self.min_length}, expected at most max_length={self.max_length}")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a row."""
        return _as_ids(self.eos_token_id) if self.stop_at_eos else ()

    @property
    def last_ids(self) -> tuple[int, ...]:
        """The ids of `forced_eos_token_id`."""
        return _as_ids(self.forced_eos_token_id)

    @property
    def biases(self) -> dict[tuple[int, ...], float]:
        """The biases of `sequence_bias`, by sequence."""
        pairs = self.sequence_bias or {}
        return {tuple(word): bias for word, bias in (pairs.items() if isinstance(pairs, Mapping) else pairs)}

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a row."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    @property
    def pad_id(self) -> int:
        """The id that fills a row after its end."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        eos = dataclasses.replace(self, stop_at_eos=True).eos_ids
        return eos[0] if eos else 0

    @property
    def padding(self) -> int | None:
        """The padding id of prompts without a mask: `pad_token_id`, unless it also ends rows."""
        ends = dataclasses.replace(self, stop_at_eos=True).eos_ids
        return None if self.pad_token_id in ends else self.pad_token_id

    def least_tokens(self, columns: int) -> int:
        """The smallest number of new tokens after a prompt of so many columns."""
        return max(self.min_new_tokens, self.min_length - columns)

    def new_tokens(self, columns: int) -> int:
        """The largest number of new tokens after a prompt of so many columns.

        Raises:
            InputError: `max_length` leaves no room.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return max(_DEFAULT_NEW_TOKENS, self.least_tokens(columns))
        if self.max_length <= columns:
            raise InputError(
                f"max_length is {self.max_length}, but the prompt has {columns} columns; expected more; or give "
                "max_new_tokens"
            )
        return self.max_length - columns


def arguments(input_ids: Any, attention_mask: Any, generation_config: Any, inputs: Any) -> tuple[Any, Any, Any]:
    """Returns the first three arguments, also if they are given by the names or in the order of transformers.

    There, `inputs` is the name of `input_ids`, and the options may come second.

    Raises:
        InputError: an argument is given twice.
    """
    if inputs is not None:
        if input_ids is not None:
            raise InputError("input_ids and inputs are both given, expected one of the two")
        input_ids = inputs
    if hasattr(attention_mask, "max_new_tokens"):
        if generation_config is not None:
            raise InputError("generation_config is given twice; attention_mask comes second")
        attention_mask, generation_config = None, attention_mask
    return input_ids, attention_mask, generation_config


def given_options(given: Any, own: GenerationConfig) -> GenerationConfig:
    """The options for the `generation_config` of a call.

    Args:
        given: our options, or an object of transformers' class, or None. Unset options follow the model's.
        own: the model's options.

    Raises:
        InputError: it has another type, or has options that are not offered.
    """
    if given is None:
        return own
    if isinstance(given, GenerationConfig):
        return given.over(own)
    if not hasattr(given, "to_diff_dict"):
        raise InputError(f"generation_config is a {type(given).__name__}, expected a GenerationConfig")
    values = plain(given.to_diff_dict())
    for name, instead in not_offered(values).items():
        raise InputError(f"generation_config has {name}, which is not offered here; {instead}")
    known = {item.name for item in dataclasses.fields(own)}
    values = {name: value for name, value in values.items() if name in known and value is not None}
    if "max_length" in values:
        values.setdefault("max_new_tokens", None)
    return dataclasses.replace(own, **values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_int(item) for item in value)


def _is_biases(value: Any) -> bool:
    pairs = value.items() if isinstance(value, Mapping) else value
    return isinstance(pairs, Iterable) and all(
        isinstance(pair, Sequence)
        and len(pair) == 2
        and _is_ids(pair[0])
        and len(pair[0]) > 0
        and _is_number(pair[1])
        and pair[1] < 3e38  # It must fit float32.
        for pair in pairs
    )


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _is_strings(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, Sequence) and all(isinstance(item, str) and item for item in texts)


_POSITIVE = (lambda value: _is_int(value) and value > 0, "a positive integer")
_POSITIVE_OR_NONE = (lambda value: value is None or (_is_int(value) and value > 0), "a positive integer")
_COUNT = (lambda value: _is_int(value) and value >= 0, "an integer, 0 or more")
_ID = (lambda value: value is None or _is_int(value), "an id or None")
_IDS = (lambda value: value is None or _is_ids(value), "a list of ids, or None")
_ID_OR_IDS = (lambda value: value is None or _is_int(value) or _is_ids(value), "an id, a list of ids, or None")
_SHARE = (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, at most 1")
_FLAG = (lambda value: isinstance(value, bool), "True or False")

# For each option: whether a value is allowed, and what is expected.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _POSITIVE_OR_NONE,
    "max_length": _POSITIVE_OR_NONE,
    "min_new_tokens": _COUNT,
    "min_length": _COUNT,
    "max_time": (lambda value: value is None or (_is_number(value) and value > 0), "a positive number of seconds"),
    "eos_token_id": _ID_OR_IDS,
    "stop_at_eos": _FLAG,
    "stop_strings": (
        lambda value: value is None or _is_strings(value),
        "a string that is not empty, or a list of such",
    ),
    "pad_token_id": _ID,
    "do_sample": _FLAG,
    "temperature": (lambda value: _is_number(value) and 0 < value < float("inf"), "a positive number"),
    "top_k": _COUNT,
    "top_p": _SHARE,
    "min_p": (lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "a number from 0 to 1, or None"),
    "typical_p": _SHARE,
    "seed": (lambda value: value is None or (_is_int(value) and value >= 0), "an integer, 0 or more, or None"),
    "num_beams": _POSITIVE,
    "length_penalty": (lambda value: _is_number(value) and abs(value) < float("inf"), "a number"),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "True, False or 'never'"),
    "num_return_sequences": _POSITIVE,
    "repetition_penalty": (lambda value: _is_number(value) and 0 < value < float("inf"), "a positive number"),
    "no_repeat_ngram_size": _COUNT,
    "bad_words_ids": (
        lambda value: value is None or (isinstance(value, Sequence) and all(_is_ids(item) and item for item in value)),
        "a list of lists of ids, none of them empty",
    ),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "sequence_bias": (
        lambda value: value is None or _is_biases(value),
        "a dictionary of tuples of ids to numbers, or a list of pairs of such",
    ),
    "forced_bos_token_id": _ID,
    "forced_eos_token_id": _ID_OR_IDS,
    "renormalize_logits": _FLAG,
    "return_dict_in_generate": _FLAG,
    "output_scores": _FLAG,
    "output_logits": _FLAG,
    "use_cache": _FLAG,
}

_DEFAULTS = vars(GenerationConfig())
FOR_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
# The meaning of None for options where it is not the default: no limit, as in transformers.
_OFF = {**_DEFAULTS, "top_k": 0}
_FOR_BEAMS = ("length_penalty", "early_stopping")


def _check_effects(config: GenerationConfig, options: dict[str, Any]) -> None:
    """Refuses options of a call that would have no effect together with the others."""
    asked = {name for name, value in options.items() if value != _DEFAULTS[name]}
    for names, needed, is_met in (
        (FOR_SAMPLING, "do_sample=True", config.do_sample),
        (_FOR_BEAMS, "num_beams of 2 or more", config.num_beams > 1),
        (("output_scores", "output_logits"), "return_dict_in_generate=True", config.return_dict_in_generate),
    ):
        for name in names:
            if name in asked and not is_met:
                raise InputError(f"{name}={options[name]!r} has no effect without {needed}")
    if config.num_return_sequences > 1 and not config.do_sample and config.num_beams < config.num_return_sequences:
        raise InputError(
            f"num_return_sequences is {config.num_return_sequences}, but without do_sample=True or as many num_beams "
            "all of them would be the same"
        )
    if config.num_return_sequences > config.num_beams > 1:
        raise InputError(
            f"num_return_sequences is {config.num_return_sequences}, expected at most num_beams={config.num_beams}"
        )
    if not config.stop_at_eos and options.get("eos_token_id") is not None:
        raise InputError("eos_token_id and stop_at_eos=False are both given, expected one of the two")
