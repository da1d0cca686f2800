"""Blocks one by one, or stacked along a first axis, as `jax.lax.scan` wants them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from xglm_core.config import XGLMConfig
from xglm_core.errors import ConfigError, InputError


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The tree with all blocks in one: each leaf below "layers" is stacked along a first axis [num_layers, ...].

    A model with `scan_layers=True` takes this tree as it is, whereas it stacks the published one in each call, which
    takes as much memory again. So keep the stacked one for training, and gradients and optimizer state are stacked too.

    Args:
        params: the parameters of any of the models, or a tree of the same structure; it is left alone.

    Returns:
        A new tree; `params` itself if it is stacked.
    """
    layers = _layers(params)
    if is_stacked(layers):
        return params
    return _with_layers(params, stacked_blocks(layers))


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The published tree, with the blocks under "0", "1", ...; `params` itself if it is that."""
    layers = _layers(params)
    if not is_stacked(layers):
        return params
    blocks = unstacked(layers, len(jax.tree.leaves(layers)[0]))
    return _with_layers(params, {str(i): block for i, block in enumerate(blocks)})


def is_stacked(layers: Any) -> bool:
    """Whether a tree of blocks, the part below "layers", is stacked."""
    return bool(layers) and not any(key.isdecimal() for key in layers)


def stacked_blocks(layers: Any) -> Any:
    """One stacked block from a tree of blocks; itself if it is that."""
    return layers if is_stacked(layers) else stacked([layers[str(i)] for i in range(len(layers))])


def stacked(trees: list[Any]) -> Any:
    """One tree from those of all blocks: each leaf has a first axis [num_layers, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree: Any, count: int) -> list[Any]:
    """The trees of `count` blocks, from one whose leaves have them along the first axis."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def check_stackable(config: XGLMConfig) -> None:
    """Raises `ConfigError` if the blocks of a model differ in shape."""
    counts = [len(config.kept_heads(index)) for index in range(config.num_layers)]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"config: pruned_heads leaves {counts} heads in the blocks, but scan_layers=True needs as many in each; "
            "use scan_layers=False"
        )


def check_layout(layers: Any) -> None:
    """Raises `InputError` if blocks that are to run one by one are stacked."""
    if is_stacked(layers):
        raise InputError(
            "the blocks of params are stacked, which takes scan_layers=True; or use unstack_layers(params)"
        )


def _layers(params: dict[str, Any]) -> Any:
    return params.get("model", params).get("layers", {})


def _with_layers(params: dict[str, Any], layers: Any) -> dict[str, Any]:
    if "model" in params:
        return {**params, "model": {**params["model"], "layers": layers}}
    return {**params, "layers": layers}
