"""The weights of a model: canonical names, shapes, and their names in each backend.

Canonical names and shapes are those of the published PyTorch checkpoints. There, a dense kernel is [out, in]; in Keras
and Flax it is [in, out], hence `transposed`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from xglm_core.config import XGLMConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Checkpoints may hold these, but no model needs them: the position table is computed from the configuration.
IGNORED = frozenset({"model.embed_positions.weights"})
_IGNORED_INTEGERS = ("position_ids", "num_batches_tracked")  # The last parts of their names.


@dataclass(frozen=True)
class _Kind:
    """How the backends name the parameters of one kind of layer, and whether they transpose its matrix."""

    parameters: dict[str, tuple[str, str]]  # canonical -> (Keras, Flax)
    transposed: bool = False


_EMBEDDING = _Kind({"weight": ("embeddings", "embedding")})
_DENSE = _Kind({"weight": ("kernel", "kernel"), "bias": ("bias", "bias")}, transposed=True)
_HEAD = _Kind({"weight": ("kernel", "kernel")}, transposed=True)
_NORM = _Kind({"weight": ("gamma", "scale"), "bias": ("beta", "bias")})

# The inverse: the canonical name of a Keras or Flax parameter, and whether it is transposed.
_PARAMETERS = {
    theirs: (ours, kind.transposed and ours == "weight")
    for kind in (_EMBEDDING, _DENSE, _NORM)
    for ours, names in kind.parameters.items()
    for theirs in names
}

# Name, kind, and shape of the weight of each layer, by keys of the configuration. A bias has the first dimension.
# "kept_width" is d_model without the width of the pruned heads of a block.
_LAYERS: tuple[tuple[str, _Kind, tuple[str, ...]], ...] = (
    ("model.embed_tokens", _EMBEDDING, ("vocab_size", "d_model")),
    ("model.layers.{}.self_attn.k_proj", _DENSE, ("kept_width", "d_model")),
    ("model.layers.{}.self_attn.v_proj", _DENSE, ("kept_width", "d_model")),
    ("model.layers.{}.self_attn.q_proj", _DENSE, ("kept_width", "d_model")),
    ("model.layers.{}.self_attn.out_proj", _DENSE, ("d_model", "kept_width")),
    ("model.layers.{}.encoder_attn.k_proj", _DENSE, ("d_model", "d_model")),
    ("model.layers.{}.encoder_attn.v_proj", _DENSE, ("d_model", "d_model")),
    ("model.layers.{}.encoder_attn.q_proj", _DENSE, ("d_model", "d_model")),
    ("model.layers.{}.encoder_attn.out_proj", _DENSE, ("d_model", "d_model")),
    ("model.layers.{}.encoder_attn_layer_norm", _NORM, ("d_model",)),
    ("model.layers.{}.self_attn_layer_norm", _NORM, ("d_model",)),
    ("model.layers.{}.fc1", _DENSE, ("ffn_dim", "d_model")),
    ("model.layers.{}.fc2", _DENSE, ("d_model", "ffn_dim")),
    ("model.layers.{}.final_layer_norm", _NORM, ("d_model",)),
    ("model.layer_norm", _NORM, ("d_model",)),
    ("lm_head", _HEAD, ("vocab_size", "d_model")),
)


@dataclass(frozen=True)
class WeightSpec:
    """One weight.

    Attributes:
        name: canonical name, e.g. "model.layers.3.fc1.weight"; the torch backend's parameter name.
        shape: canonical shape.
        keras: path below the causal-LM model, e.g. "model/layers.3/fc1/kernel".
        flax: path in the params tree, e.g. ("model", "layers", "3", "fc1", "kernel").
        transposed: whether Keras and Flax hold the transpose.
    """

    name: str
    shape: tuple[int, ...]
    keras: str
    flax: tuple[str, ...]
    transposed: bool


def weight_specs(config: XGLMConfig, *, with_head: bool, bare: bool = False) -> tuple[WeightSpec, ...]:
    """All weights of a model in the order of the published checkpoints.

    Args:
        config: the architecture.
        with_head: whether the model has a head of its own. A tied head is not a separate weight.
        bare: whether paths in Flax are those of the bare decoder, without the level "model".
    """
    specs = []
    for layer, kind, sizes in _expanded(config):
        if layer == "lm_head" and not with_head:
            continue
        for parameter, (keras, flax) in kind.parameters.items():
            matrix = parameter == "weight" and len(sizes) == 2
            specs.append(
                WeightSpec(
                    name=f"{layer}.{parameter}",
                    shape=sizes if parameter == "weight" else sizes[:1],
                    keras=f"{layer.replace('.', '/').replace('layers/', 'layers.')}/{keras}",
                    flax=(*layer.removeprefix("model." * bare).split("."), flax),
                    transposed=kind.transposed and matrix,
                )
            )
    return tuple(specs)


def is_ignored_integer(name: str) -> bool:
    """Whether a tensor of integers is known to have no effect: consecutive positions, and counters."""
    return name.rpartition(".")[2] in _IGNORED_INTEGERS


def stored_prefix(names: Collection[str]) -> str:
    """The prefix of all names: `DistributedDataParallel`, `torch.compile` and others put the path to a model there.

    Args:
        names: all names of a checkpoint. The names of a bare decoder, without "model.", have no prefix.
    """
    name = EMBEDDING.removeprefix("model.")
    found = [stored for stored in names if f".{stored}".endswith(f".{name}")]
    if len(found) != 1:
        return ""
    way = found[0].split(".")[:-2]
    prefix = "".join(f"{part}." for part in (way[:-1] if way[-1:] == ["model"] else way))
    return prefix if all(stored.startswith(prefix) for stored in names) else ""


def canonical_name(path: Sequence[str]) -> tuple[str, bool]:
    """The canonical name for a path in Flax or Keras, and whether the matrix is transposed there.

    A path that does not end in a known parameter keeps its parts.
    """
    parameter, transposed = _PARAMETERS.get(path[-1], (path[-1], False)) if path else ("", False)
    return ".".join([*path[:-1], parameter]), transposed


def num_parameters(config: XGLMConfig) -> int:
    """The number of parameters of the causal language model; a tied head is not counted twice."""
    return sum(math.prod(spec.shape) for spec in weight_specs(config, with_head=not config.tie_word_embeddings))


def _expanded(config: XGLMConfig) -> Iterator[tuple[str, _Kind, tuple[int, ...]]]:
    """Yields the rows of `_LAYERS` with sizes; those of a block are repeated for each block."""
    rows = [row for row in _LAYERS if config.add_cross_attention or "encoder_attn" not in row[0]]
    for is_block, group in itertools.groupby(rows, key=lambda row: "{}" in row[0]):
        block = list(group)
        for index in range(config.num_layers if is_block else 1):
            kept_width = config.head_dim * (config.attention_heads - len(config.pruned_heads.get(index, ())))
            for layer, kind, shape in block:
                sizes = tuple(kept_width if size == "kept_width" else getattr(config, size) for size in shape)
                yield layer.format(index), kind, sizes
