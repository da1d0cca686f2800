"""The generation engine: reading, several tokens at a time, and selection on the device."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.generation.compiled import Compiled, CompiledEngine
from xglm_core.generation.engine import BLOCK
from xglm_core.generation.selection import DeviceRules
from xglm_tf.cache import TFXGLMCache, empty_cache, picked, reordered, with_capacity
from xglm_tf.fast.one_row import packed, unpacked
from xglm_tf.selection import selection

if TYPE_CHECKING:
    from xglm_tf.causal_lm import TFXGLMForCausalLM

_compiled = functools.partial(tf.function, jit_compile=True, autograph=False)


def compile_engine(model: TFXGLMForCausalLM) -> Compiled:
    """Prepares the functions of a model; each is compiled when it first meets a shape or rules of another kind.

    They refer to its variables, so that there is no second copy. Differs: PyTorch compiles nothing.
    """
    return Compiled(
        prefill=_compiled(functools.partial(_prefill, model)),
        feed=_compiled(functools.partial(_feed, model)),
        advance=_compiled(functools.partial(_advance, model)),
        select=_compiled(selection.select),
        candidates=_compiled(selection.candidates),
        scores=_compiled(selection.scores),
        mark_seen=selection.mark_seen,
        copied=_copied,
        reordered=_reordered,
        picked=picked,
    )


class TFEngine(CompiledEngine):
    """See `CompiledEngine`. Differs: shapes are free in `xglm_torch.generation.TorchEngine`, which compiles nothing."""

    bucket = 32

    def ids(self, sequences: np.ndarray) -> tf.Tensor:
        """See `Engine.ids`."""
        return tf.constant(sequences)


def _prefill(
    model: TFXGLMForCausalLM, inputs: DecoderInputs, past: TFXGLMCache | None, capacity: int
) -> tuple[tf.Tensor, TFXGLMCache]:
    if past is None:
        past = empty_cache(model.config, inputs.attention_mask.shape[0], capacity, model.compute_dtype)
    return _read(model, inputs, past)


def _feed(
    model: TFXGLMForCausalLM, tokens: tf.Tensor, cache: TFXGLMCache, seen: tf.Tensor
) -> tuple[tf.Tensor, TFXGLMCache, tf.Tensor]:
    column = tokens[:, None]
    return *_read(model, DecoderInputs(column), cache), selection.mark_seen(seen, column)


def _advance(
    model: TFXGLMForCausalLM,
    tokens: tf.Tensor,
    cache: TFXGLMCache,
    seen: tf.Tensor,
    rules: DeviceRules,
    keys: tf.Tensor,
    steps: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, TFXGLMCache, tf.Tensor]:
    columns = tf.range(BLOCK)

    def step(
        index: tf.Tensor, tokens: tf.Tensor, selected: tf.Tensor, _: tf.Tensor, cache: TFXGLMCache, seen: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, TFXGLMCache, tf.Tensor]:
        logits, cache, seen = _feed(model, tokens, unpacked(cache), seen)
        chosen = selection.select(logits, seen, rules, tf.gather(keys, index, axis=1))
        selected = tf.where(columns == index, chosen[:, None], selected)
        # A code stands for no token.
        return index + 1, tf.maximum(chosen, 0), selected, logits, packed(cache), seen

    rows = tokens.shape[0]
    logits = tf.zeros((rows, model.config.vocab_size), model.compute_dtype)
    begin = (0, tokens, tf.zeros((rows, BLOCK), tf.int32), logits, packed(cache), seen)
    _, _, selected, logits, cache, seen = tf.while_loop(lambda index, *_: index < steps, step, begin)
    return selected, logits, unpacked(cache), seen


def _read(model: TFXGLMForCausalLM, inputs: DecoderInputs, cache: TFXGLMCache) -> tuple[tf.Tensor, TFXGLMCache]:
    """The logits of the last token of each row [rows, vocab_size], and the cache."""
    results = model.model(inputs, cache, Wanted(cache=True))
    return model.logits(results.last_hidden_state[:, -1:])[:, 0], results.past_key_values


def _copied(cache: TFXGLMCache, rows: np.ndarray | None, capacity: int) -> TFXGLMCache:
    return with_capacity(cache if rows is None else reordered(cache, rows), capacity)


def _reordered(
    cache: TFXGLMCache, logits: tf.Tensor, seen: tf.Tensor, rows: np.ndarray
) -> tuple[TFXGLMCache, tf.Tensor, tf.Tensor]:
    return reordered(cache, rows), tf.gather(logits, rows), tf.gather(seen, rows)


def draw_seed() -> int:
    """A seed that `keras.utils.set_random_seed` and `tf.random.set_seed` make repeatable."""
    return int(tf.random.uniform((), maxval=tf.int64.max, dtype=tf.int64))
