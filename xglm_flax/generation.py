"""The generation engine: prefill, steps and token selection on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.generation.loop import BLOCK
from xglm_flax.cache import FlaxXGLMCache, with_capacity
from xglm_flax.stacking import stack_layers
from xglm_flax.weights import Params


@dataclasses.dataclass(frozen=True)
class CompiledEngine:
    """The compiled functions of one module. They take its parameters as an argument, so that there is no second copy.

    Attributes:
        prefill: see `_prefill`, without its first argument.
        advance: see `_advance`, without its first argument; it consumes the cache.
    """

    prefill: Callable[..., tuple[jax.Array, FlaxXGLMCache]]
    advance: Callable[..., tuple[jax.Array, jax.Array, FlaxXGLMCache]]


def compile_engine(module: nn.Module) -> CompiledEngine:
    """Prepares the functions of a causal-LM module; each is compiled when it first meets a shape."""
    return CompiledEngine(
        prefill=jax.jit(functools.partial(_prefill, module), static_argnames="capacity"),
        advance=jax.jit(functools.partial(_advance, module), donate_argnames="cache"),
    )


class FlaxEngine:
    """Implements `xglm_core.generation.loop.Engine`.

    Differs: everything is compiled for fixed shapes, so prompts and capacities are multiples of `bucket`, and the steps
    are a loop in compiled code.
    """

    bucket = 64

    def __init__(self, compiled: CompiledEngine, params: Params) -> None:
        self._compiled = compiled
        self._params = params

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, capacity: int) -> np.ndarray:
        """See `Engine.prefill`."""
        self._tokens, self._cache = self._compiled.prefill(self._params, input_ids, attention_mask, capacity=capacity)
        return np.asarray(self._tokens)[:, 0]

    def advance(self, steps: int) -> np.ndarray:
        """See `Engine.advance`."""
        selected, self._tokens, self._cache = self._compiled.advance(
            self._params, self._tokens, cache=self._cache, steps=steps
        )
        return np.asarray(selected)[:, :steps]


def _prefill(
    module: nn.Module, params: Params, input_ids: jax.Array, attention_mask: jax.Array, *, capacity: int
) -> tuple[jax.Array, FlaxXGLMCache]:
    """Reads ids [rows, length]; returns the likeliest next ids [rows, 1] and a cache with room for `capacity`."""
    outputs: Any = module.apply(
        {"params": params}, input_ids, attention_mask, use_cache=True, logits_to_keep=1, return_dict=True
    )
    return _likeliest(outputs.logits), with_capacity(outputs.past_key_values, capacity)


def _advance(
    module: Any, params: Params, tokens: jax.Array, cache: FlaxXGLMCache, steps: jax.Array
) -> tuple[jax.Array, jax.Array, FlaxXGLMCache]:
    """Feeds the last ids [rows, 1] and selects the next, `steps` times.

    `steps` is traced, so that one compilation serves all counts. Layers to be scanned are stacked once for all steps.

    Returns:
        The selected ids [rows, BLOCK], of which the first `steps` columns count, the last of these [rows, 1], and the
        cache.
    """

    def step(
        index: jax.Array, state: tuple[jax.Array, jax.Array, FlaxXGLMCache]
    ) -> tuple[jax.Array, jax.Array, FlaxXGLMCache]:
        selected, tokens, cache = state
        outputs: Any = module.apply(
            {"params": params}, tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        tokens = _likeliest(outputs.logits)
        selected = jax.lax.dynamic_update_slice_in_dim(selected, tokens, index, axis=1)
        return selected, tokens, outputs.past_key_values

    if module.scan_layers:
        params = stack_layers(params)
    selected = jnp.zeros((len(tokens), BLOCK), jnp.int32)
    return jax.lax.fori_loop(0, steps, step, (selected, tokens, cache))


def _likeliest(logits: jax.Array) -> jax.Array:
    """[rows, 1, vocab_size] -> the id of each row's largest logit, int32 [rows, 1]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
