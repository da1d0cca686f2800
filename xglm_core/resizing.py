"""Changes the shapes of a model's weights: a larger or smaller vocabulary, fewer attention heads.

The new weights are computed here, in numpy, once for all backends; a backend only stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from xglm_core.checkpoint.dtypes import DTYPES, FloatType, convert
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.python_values import plain
from xglm_core.rounding import rounded_up

_SEED = 0  # New rows are the same in all backends and in each call.

_NARROW = 1e-9  # The factor of the old rows' variance with which transformers draws.

_ROWS, _COLUMNS = 0, 1


def resized_config(config: XGLMConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> XGLMConfig:
    """The configuration with another `vocab_size`, and with `padding_rows` that fit.

    Args:
        config: the configuration, which is not modified.
        new_num_tokens: the new number of rows; None keeps it.
        pad_to_multiple_of: rounds the number of rows up to a multiple of this; None does not.

    Raises:
        InputError: an argument is not a positive integer.
        ConfigError: `pad_token_id` would be outside the vocabulary.
    """
    rows = config.vocab_size if new_num_tokens is None else plain(new_num_tokens)
    multiple = 1 if pad_to_multiple_of is None else plain(pad_to_multiple_of)
    for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", multiple)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}, expected a positive integer or None")
    rounded = rounded_up(rows, multiple)
    words = config.vocab_size - config.padding_rows if new_num_tokens is None else new_num_tokens
    return XGLMConfig.from_dict({**config.to_dict(), "vocab_size": rounded, "padding_rows": rounded - words})


def take_sizes(config: XGLMConfig, new: XGLMConfig) -> None:
    """Gives a configuration, in place, those values of another that `resized_config` and `pruned_config` change."""
    for name in ("vocab_size", "padding_rows", "pruned_heads"):
        setattr(config, name, getattr(new, name))


def check_embeddings(shape: Sequence[int], config: XGLMConfig) -> None:
    """Raises `InputError` unless `shape` is that of the embedding matrix."""
    if tuple(shape) != (config.vocab_size, config.d_model):
        raise InputError(
            f"the embedding is {list(shape)}, expected [{config.vocab_size}, {config.d_model}] "
            "([vocab_size, d_model]); resize_token_embeddings changes the vocabulary"
        )


def resized_rows(matrix: np.ndarray, dtype: FloatType, config: XGLMConfig, mean_resizing: bool = False) -> np.ndarray:
    """A matrix [old, d_model] with `config.vocab_size` rows: the old ones, then draws from N(0, init_std).

    Args:
        matrix: in `dtype.storage`, and so is the result.
        dtype: the type of its values.
        config: the new configuration.
        mean_resizing: whether to draw around the mean of the old rows instead, with a billionth of their variance.
    """
    old, rows = len(matrix), config.vocab_size
    if rows <= old:
        return matrix[:rows]
    new = np.random.default_rng(_SEED).standard_normal((rows - old, matrix.shape[1]), np.float32)
    if mean_resizing:
        known = convert(matrix, dtype, DTYPES["float32"])
        mean = known.mean(axis=0, dtype=np.float64)
        variance = np.einsum("ij,ij->j", known, known, dtype=np.float64) / old - mean**2
        new = (mean + np.sqrt(_NARROW * variance.clip(0)) * new).astype(np.float32)
    else:
        new *= np.float32(config.init_std)
    return np.concatenate([matrix, convert(new, DTYPES["float32"], dtype)])


def pruned_config(config: XGLMConfig, heads: Mapping[int, Sequence[int]]) -> XGLMConfig:
    """The configuration without some heads; earlier pruned heads stay pruned.

    Args:
        config: the configuration, which is not modified.
        heads: the self-attention heads to remove, by the index of their block, numbered as in the unpruned model.

    Raises:
        ConfigError: there is no such block or head, or a block would have none left.
    """
    pruned = {layer: [*config.pruned_heads.get(layer, ()), *more] for layer, more in dict(heads).items()}
    return XGLMConfig.from_dict({**config.to_dict(), "pruned_heads": {**config.pruned_heads, **pruned}})


def pruned_weights(
    old: XGLMConfig, new: XGLMConfig, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights that change from `old` to `new`, by canonical name, in canonical shape.

    Args:
        old: the old configuration.
        new: the new configuration, with more pruned heads.
        read: returns an old weight.
    """
    for layer in range(old.num_layers):
        kept_before, kept = old.kept_heads(layer), new.kept_heads(layer)
        if kept == kept_before:
            continue
        heads = np.array([kept_before.index(head) for head in kept])
        units = (heads[:, None] * old.head_dim + np.arange(old.head_dim)).reshape(-1)
        attention = f"model.layers.{layer}.self_attn"
        for projection in ("k_proj", "v_proj", "q_proj"):
            for parameter in ("weight", "bias"):
                name = f"{attention}.{projection}.{parameter}"
                yield name, read(name).take(units, axis=_ROWS)
        name = f"{attention}.out_proj.weight"
        yield name, read(name).take(units, axis=_COLUMNS)
