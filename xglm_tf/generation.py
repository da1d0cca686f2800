"""The generation engine: prefill, steps and token selection on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from xglm_core.generation.loop import BLOCK
from xglm_tf.cache import TFXGLMCache, with_capacity

if TYPE_CHECKING:
    from xglm_tf.causal_lm import TFXGLMForCausalLM


@dataclasses.dataclass(frozen=True)
class CompiledEngine:
    """The compiled functions of one model. They refer to its variables, so that there is no second copy.

    Attributes:
        prefill: see `_prefill`, without its first argument.
        advance: see `_advance`, without its first argument.
    """

    prefill: Callable[..., tuple[tf.Tensor, TFXGLMCache]]
    advance: Callable[..., tuple[tf.Tensor, tf.Tensor, TFXGLMCache]]


def compile_engine(model: TFXGLMForCausalLM) -> CompiledEngine:
    """Prepares the functions of a model; each is compiled when it first meets a shape."""
    return CompiledEngine(
        prefill=tf.function(functools.partial(_prefill, model), jit_compile=True, autograph=False),
        advance=tf.function(functools.partial(_advance, model), jit_compile=True, autograph=False),
    )


class TFEngine:
    """Implements `xglm_core.generation.loop.Engine`.

    Differs: everything is compiled for fixed shapes, so prompts and capacities are multiples of `bucket`, and the steps
    are a loop in compiled code.
    """

    bucket = 64

    def __init__(self, compiled: CompiledEngine) -> None:
        self._compiled = compiled

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, capacity: int) -> np.ndarray:
        """See `Engine.prefill`."""
        ids, mask = tf.constant(input_ids, tf.int32), tf.constant(attention_mask, tf.int32)
        self._tokens, self._cache = self._compiled.prefill(ids, mask, capacity)
        return self._tokens[:, 0].numpy()

    def advance(self, steps: int) -> np.ndarray:
        """See `Engine.advance`."""
        selected, self._tokens, self._cache = self._compiled.advance(self._tokens, self._cache, tf.constant(steps))
        return selected[:, :steps].numpy()


def _prefill(
    model: TFXGLMForCausalLM, input_ids: tf.Tensor, attention_mask: tf.Tensor, capacity: int
) -> tuple[tf.Tensor, TFXGLMCache]:
    """Reads ids [rows, length]; returns the likeliest next ids [rows, 1] and a cache with room for `capacity`."""
    outputs = model(input_ids, attention_mask, use_cache=True, logits_to_keep=1)
    return _likeliest(outputs.logits), with_capacity(outputs.past_key_values, capacity)


def _advance(
    model: TFXGLMForCausalLM, tokens: tf.Tensor, cache: TFXGLMCache, steps: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, TFXGLMCache]:
    """Feeds the last ids [rows, 1] and selects the next, `steps` times.

    `steps` is a tensor, so that one compilation serves all counts.

    Returns:
        The selected ids [rows, BLOCK], of which the first `steps` columns count, the last of these [rows, 1], and the
        cache.
    """
    columns = tf.range(BLOCK)

    def step(
        index: tf.Tensor, selected: tf.Tensor, tokens: tf.Tensor, cache: TFXGLMCache
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, TFXGLMCache]:
        outputs = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = _likeliest(outputs.logits)
        return index + 1, tf.where(columns == index, tokens, selected), tokens, outputs.past_key_values

    selected = tf.zeros((tokens.shape[0], BLOCK), tf.int32)
    _, *results = tf.while_loop(lambda index, *_: index < steps, step, (0, selected, tokens, cache))
    return tuple(results)


def _likeliest(logits: tf.Tensor) -> tf.Tensor:
    """[rows, 1, vocab_size] -> the id of each row's largest logit, int32 [rows, 1]."""
    return tf.argmax(logits, axis=-1, output_type=tf.int32)
