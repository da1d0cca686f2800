"""Checks the arguments of a call before any computation, with one wording for all backends.

Shapes are known even while tracing; an unknown size (None) passes. Values are numpy views of the framework's tensors.
While a backend is traced (jit, export) there are no values, and their checks are skipped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from xglm_core.calls import DecoderInputs
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError

IGNORED_LABEL = -100  # The label of positions that do not count, as in every framework.

Shape = Sequence[int | None]

# Gives the values of an array; None if there are none to look at, while a framework traces.
Look = Callable[[Any], np.ndarray | None]

Method = TypeVar("Method", bound=Callable[..., Any])

# Arguments that are arrays, and may be given as lists.
_ARRAYS = (
    *("input_ids", "inputs", "attention_mask", "position_ids", "inputs_embeds", "labels", "logits_to_keep"),
    *("encoder_hidden_states", "encoder_attention_mask", "head_mask", "cross_attn_head_mask"),
)


def inputs_as_given(prepared: Callable[[Any, Any], Any] = lambda model, value: value) -> Callable[[Method], Method]:
    """Lets a method of a model accept its inputs in several forms.

    The first argument may be a mapping of arguments by name, such as a `BatchEncoding`. Lists become arrays, and numpy
    scalars become Python numbers; see `plain_input`.

    Args:
        prepared: converts an array or tensor; its arguments are the model and the value.

    Raises:
        InputError: see `plain_input`; or an argument is given both in the mapping and beside it, or follows it by
            position.
    """

    def decorate(method: Method) -> Method:
        names = tuple(inspect.signature(method).parameters)[1:]

        def taken(model: Any, name: str, value: Any) -> Any:
            value = plain_input(name, value)
            return prepared(model, value) if name in _ARRAYS else value

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            before, after = args[: len(names)], args[len(names) :]
            if args and isinstance(args[0], Mapping):
                twice = [name for name in args[0] if name in kwargs]
                if len(args) > 1 or twice:
                    what = f"{', '.join(twice)} is given twice" if twice else "arguments follow it by position"
                    raise InputError(
                        f"the first argument is a mapping of arguments, and {what}; give each by name, once"
                    )
                before, kwargs = (), {**args[0], **kwargs}
            inputs = [taken(self, name, value) for name, value in zip(names, before, strict=False)]
            named = {name: taken(self, name, value) for name, value in kwargs.items()}
            return method(self, *inputs, *after, **named)

        return call  # type: ignore[return-value]

    return decorate


def plain_input(name: str, value: Any) -> Any:
    """Converts lists to arrays, and numpy scalars to Python numbers; returns anything else as it is.

    Raises:
        InputError: it is text, has rows of different lengths, or is a single row without a batch axis.
    """
    if isinstance(value, np.generic):
        return value.item()
    if name in _ARRAYS and isinstance(value, str | list | tuple | np.ndarray):
        given = value
        try:
            value = np.asarray(given)
        except (ValueError, TypeError):
            raise InputError(
                f"{name} has rows of different lengths, which fit no tensor; pad them: tokenizer(texts, padding=True) "
                "or tokenizer.pad"
            ) from None
        if value.dtype.kind in "US":
            raise InputError(
                f"{name} is text, expected integers [batch, length]; encode it: tokenizer(texts, padding=True, "
                "return_tensors=...)"
            )
        if value.dtype == np.float64 and value is not given:  # From a list, which has no type of its own.
            value = value.astype(np.float32)
    if name in ("input_ids", "inputs") and getattr(value, "ndim", None) in (0, 1):
        raise InputError(
            f"{name} is {list(value.shape)}, expected integers [batch, length], neither 0; a single row is {name}[None]"
        )
    return value


def check_not_traced(name: str, traced: bool) -> None:
    """Raises `InputError` if a framework traces or compiles a method that is a loop on the host."""
    if traced:
        instead = {"score": "take the log-softmax of the model's logits"}
        raise InputError(
            f"{name} is a loop on the host, which cannot be traced or compiled: call it outside; inside, "
            + instead.get(name, "loop over the model's own call with use_cache=True")
        )


def check_arguments(
    config: XGLMConfig,
    inputs: DecoderInputs,
    look: Look | None,
    cache: Any,
    seen: int | None,
    *,
    covered: int | None = None,
    shape_of: Callable[[Any], Shape] = lambda array: array.shape,
) -> None:
    """Checks which arguments of the decoder are given, their shapes, the ids, and the positions, given or counted.

    Args:
        config: the architecture.
        inputs: arrays of the framework.
        look: gives the values of an array; None if no array has any.
        cache: what was read before, with `batch`, `mask` and `encoder_length`; or None.
        seen: how many positions are cached; None if unknown.
        covered: how many of them a mask has to cover; None means `seen`.
        shape_of: gives the shape of an array, in which an unknown size is None.

    Raises:
        InputError: see `check_shapes`; or ids are outside the vocabulary, or a position is past the limit.
    """
    shapes = {name: shape_of(array) for name, array in zip(inputs._fields, inputs, strict=True) if array is not None}
    encoder_length = None if cache is None else cache.encoder_length
    check_shapes(config, shapes, past=seen if covered is None else covered, encoder_length=encoder_length)
    batch, length = shapes["input_ids" if "input_ids" in shapes else "inputs_embeds"][:2]
    if cache is not None:
        check_cache_batch(cache.batch, batch)
    if look is None:
        return
    if inputs.input_ids is not None and (ids := look(inputs.input_ids)) is not None:
        check_input_ids(ids, config)
    held = None if cache is None else cache.mask
    check_positions_of(config, look, inputs.position_ids, inputs.attention_mask, length, held, seen)


def check_positions_of(
    config: XGLMConfig,
    look: Look,
    position_ids: Any,
    attention_mask: Any,
    length: int | None,
    held: Any = None,
    seen: int | None = 0,
) -> None:
    """Checks the positions of a call, given or counted, as far as they can be looked at.

    Args:
        config: the architecture.
        look: gives the values of an array.
        position_ids, attention_mask: those of the call, or None.
        length: how many positions are new; None if unknown.
        held: the mask of the cache, or None.
        seen: how many positions are cached; None if unknown.

    Raises:
        InputError: a position is outside the position table.
    """
    if position_ids is not None:
        if (positions := look(position_ids)) is not None:
            check_positions(int(positions.min()), int(positions.max()), config)
    elif seen is not None and length is not None and seen + length > config.max_position_embeddings:
        mask, further = (held, length) if attention_mask is None else (attention_mask, 0)
        if mask is None:
            check_positions(0, seen + length - 1, config)
        elif (tokens := look(mask)) is not None:
            counted = np.count_nonzero(tokens[:, : seen + length - further], axis=1).max(initial=0)
            check_positions(0, int(counted) + further - 1, config)


def check_head_arguments(
    config: XGLMConfig,
    inputs: DecoderInputs,
    labels: Any,
    logits_to_keep: Any,
    look: Look,
    shape_of: Callable[[Any], Shape] = lambda array: array.shape,
) -> None:
    """Checks what only the causal language model takes; see `check_arguments`, which checks the inputs.

    Raises:
        InputError: labels have another shape than the ids, or are outside the vocabulary; or see
            `check_logits_to_keep`.
    """
    tokens = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
    if tokens is None:
        return
    if labels is not None:
        check_labels_shape(shape_of(labels), shape_of(tokens))
        if (values := look(labels)) is not None:
            check_labels(values, config)
    kept = logits_to_keep if isinstance(logits_to_keep, int) else look(logits_to_keep)
    if kept is not None:
        check_logits_to_keep(kept, shape_of(tokens)[1])


def check_shapes(
    config: XGLMConfig, shapes: Mapping[str, Shape | None], *, past: int | None = 0, encoder_length: int | None = None
) -> None:
    """Checks which arguments are given, and their shapes.

    Args:
        config: the architecture.
        shapes: the shapes by argument name; None or absent for missing arguments.
        past: the number of cached positions; None if unknown.
        encoder_length: the number of encoder positions in the cache; None if it has none.

    Raises:
        InputError: arguments are missing, contradict each other, or have shapes that do not fit together.
    """
    given = {name: tuple(shape) for name, shape in shapes.items() if shape is not None}
    batch, length = _check_tokens(config, given)
    _check_encoder(config, given, batch, encoder_length)
    if past is not None and length is not None and "attention_mask" in given:
        check_attention_mask(given["attention_mask"], batch, past, length)
    for name in ("head_mask", "cross_attn_head_mask"):
        _check_shape(given, name, (config.num_layers, config.attention_heads), "[num_layers, attention_heads]")
    rows = 1 if given.get("position_ids", ())[:1] == (1,) else batch  # One row for all.
    _check_shape(given, "position_ids", (rows, length), "[batch, length]")


def check_input_ids(input_ids: np.ndarray, config: XGLMConfig) -> None:
    """Raises `InputError` unless `input_ids` is an integer matrix [batch, length] of ids of the vocabulary."""
    if input_ids.ndim != 2 or not np.issubdtype(input_ids.dtype, np.integer) or 0 in input_ids.shape:
        raise InputError(
            f"input_ids is {input_ids.dtype} {list(input_ids.shape)}, expected integers [batch, length], neither 0"
        )
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        bad = lowest if lowest < 0 else highest
        row, column = np.argwhere(input_ids == bad)[0]
        raise InputError(
            f"input_ids[{row}, {column}] is {bad}, expected 0 to {config.vocab_size - 1} "
            f"(vocab_size={config.vocab_size}); does the tokenizer belong to this checkpoint?"
        )


def check_labels_shape(shape: Shape, tokens: Shape) -> None:
    """Raises `InputError` unless there is a label for each token; `tokens` is [batch, length, ...]."""
    _check_shape({"labels": tuple(shape)}, "labels", tuple(tokens[:2]), "[batch, length], not shifted")


def check_labels(labels: np.ndarray, config: XGLMConfig) -> None:
    """Raises `InputError` unless all labels [batch, length] are ids of the vocabulary, or -100 (ignored)."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels is {labels.dtype}, expected integers [batch, length]")
    wrong = np.argwhere((labels != IGNORED_LABEL) & ((labels < 0) | (labels >= config.vocab_size)))
    if len(wrong):
        row, column = wrong[0]
        raise InputError(
            f"labels[{row}, {column}] is {labels[row, column]}, expected 0 to {config.vocab_size - 1} "
            f"(vocab_size={config.vocab_size}), or {IGNORED_LABEL} where it does not count"
        )


def check_attention_mask(shape: Shape, batch: int | None, past: int, length: int) -> None:
    """Raises `InputError` unless the mask covers the cached and the new positions: [batch, past + length]."""
    if not _fits(shape, (batch, past + length)):
        cached = f" ({past} cached and {length} new)" if past else ""
        raise InputError(f"attention_mask is {list(shape)}, expected [{batch}, {past + length}]{cached}")


def check_has_tokens(attention_mask: np.ndarray) -> None:
    """Raises `InputError` if a row of the mask [batch, length] is only padding."""
    empty = np.flatnonzero(~(attention_mask != 0).any(axis=1))
    if len(empty):
        raise InputError(f"attention_mask[{empty[0]}] is all 0, expected at least one token in each row")


def check_positions(lowest: int, highest: int, config: XGLMConfig) -> None:
    """Raises `InputError` if the positions leave the position table at either end."""
    if lowest < 0:
        raise InputError(
            f"position_ids hold {lowest}, expected 0 or more; padding may have any position, 0 for example"
        )
    if highest >= config.max_position_embeddings:
        raise InputError(
            f"position {highest} is past the limit of {config.max_position_embeddings} tokens; shorten the text or set "
            f"max_position_embeddings in config.json to {highest + 1} or more (the position table is computed)"
        )


def check_cache(past: int, length: int, capacity: int) -> None:
    """Raises `InputError` if the new positions do not fit into a cache of fixed capacity."""
    if past + length > capacity:
        raise InputError(
            f"the cache holds {past} of at most {capacity} positions, and {length} more do not fit; "
            f"create it with max_length={past + length} or more"
        )


def check_past_key_values(config: XGLMConfig, past_key_values: Any) -> None:
    """Checks a cache that is a tuple with a tuple of keys and values for each layer.

    Raises:
        InputError: the layers are not (key, value) pairs, or such pairs followed by those over encoder states; or the
            shapes [batch, heads, length, head_dim] do not fit the configuration and each other.
    """
    if not isinstance(past_key_values, tuple | list):
        raise InputError(
            f"past_key_values is a {type(past_key_values).__name__}, expected the cache of an earlier call, "
            "or a tuple of (key, value) for each layer"
        )
    if len(past_key_values) != config.num_layers:
        raise InputError(f"past_key_values has {len(past_key_values)} layers, expected {config.num_layers}")
    widths = {len(layer) for layer in past_key_values}
    allowed = {2, 4} if config.add_cross_attention else {2}
    if len(widths) != 1 or not widths <= allowed:
        wanted = "2 (key, value)" + (" or 4 (and those over encoder states)" if config.add_cross_attention else "")
        raise InputError(f"past_key_values has {sorted(widths)} tensors in a layer, expected {wanted} in each")
    for index, layer in enumerate(past_key_values):
        heads = len(config.kept_heads(index)), len(config.kept_heads(index)), *([config.attention_heads] * 2)
        for item, (tensor, first) in enumerate(zip(layer, past_key_values[0], strict=True)):
            batch, length = past_key_values[0][0].shape[0], first.shape[2] if len(first.shape) == 4 else None
            if item % 2:  # A value has the same length as its key.
                length = past_key_values[0][item - 1].shape[2]
            expected = (batch, heads[item], length, config.head_dim)
            if not _fits(tensor.shape, expected):
                raise InputError(
                    f"past_key_values[{index}][{item}] is {list(tensor.shape)}, expected {list(expected)} "
                    "([batch, heads, length, head_dim])"
                )


def check_cache_batch(cached: int | None, batch: int | None) -> None:
    """Raises `InputError` if the cache belongs to another number of rows."""
    if not _fits((cached,), (batch,)):
        raise InputError(f"past_key_values holds {cached} rows, expected {batch}, as many as the input has")


def check_logits_to_keep(logits_to_keep: Any, length: int | None) -> None:
    """Raises `InputError` unless `logits_to_keep` is a count or a vector of positions from 0 to `length` - 1."""
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool) and logits_to_keep >= 0:
        return
    values = np.asarray(logits_to_keep)
    highest = values.max(initial=0) if length is None else length - 1
    if not (np.issubdtype(values.dtype, np.integer) and values.ndim == 1 and values.size) or not (
        values.min() >= 0 and values.max() <= highest
    ):
        raise InputError(
            f"logits_to_keep is {values.tolist()!r}, expected how many of the last positions to keep, 0 for all, "
            f"or a vector of positions from 0 to {'length' if length is None else length} - 1"
        )


def _check_tokens(config: XGLMConfig, given: Mapping[str, tuple[int | None, ...]]) -> tuple[int | None, int | None]:
    """The batch size and the length, from `input_ids` or `inputs_embeds`."""
    if "input_ids" in given and "inputs_embeds" in given:
        raise InputError("input_ids and inputs_embeds are both given, expected one of the two")
    if "input_ids" not in given and "inputs_embeds" not in given:
        raise InputError("neither input_ids nor inputs_embeds is given, expected one of the two")
    name = "input_ids" if "input_ids" in given else "inputs_embeds"
    shape, wanted = given[name], 2 if name == "input_ids" else 3
    if len(shape) != wanted or 0 in shape or (wanted == 3 and not _fits(shape[2:], (config.d_model,))):
        expected = "integers [batch, length]" if wanted == 2 else f"[batch, length, {config.d_model}]"
        raise InputError(f"{name} is {list(shape)}, expected {expected}, neither 0")
    return shape[0], shape[1]


def _check_encoder(
    config: XGLMConfig, given: Mapping[str, tuple[int | None, ...]], batch: int | None, cached: int | None
) -> None:
    for name in ("encoder_hidden_states", "encoder_attention_mask", "cross_attn_head_mask"):
        if name in given and not config.add_cross_attention:
            raise InputError(
                f"{name} is given, but the model has no cross-attention; expected a configuration with "
                "add_cross_attention=True"
            )
    length = cached
    if "encoder_hidden_states" in given:
        shape = given["encoder_hidden_states"]
        _check_shape(
            given, "encoder_hidden_states", (batch, cached, config.d_model), "[batch, encoder length, d_model]"
        )
        length = shape[1]
    elif "encoder_attention_mask" in given and cached is None:
        raise InputError("encoder_attention_mask is given without encoder_hidden_states, expected both or neither")
    _check_shape(given, "encoder_attention_mask", (batch, length), "[batch, encoder length]")


def _check_shape(
    given: Mapping[str, tuple[int | None, ...]], name: str, expected: tuple[int | None, ...], meaning: str
) -> None:
    if name in given and not _fits(given[name], expected):
        shape = ", ".join("any" if size is None else str(size) for size in expected)
        raise InputError(f"{name} is {list(given[name])}, expected [{shape}] ({meaning})")


def _fits(shape: Shape, expected: Shape) -> bool:
    """Whether two shapes agree where both are known."""
    return len(shape) == len(expected) and all(
        found is None or wanted is None or found == wanted for found, wanted in zip(shape, expected, strict=True)
    )
