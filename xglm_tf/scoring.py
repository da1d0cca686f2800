"""The scoring engine: log-probabilities of given tokens, tile by tile of the logits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.scoring import engine
from xglm_tf.selection import selection

if TYPE_CHECKING:
    from xglm_tf.causal_lm import TFXGLMForCausalLM


def compile_scorer(model: TFXGLMForCausalLM) -> Any:
    """The function of `xglm_core.scoring.engine.CompiledScorer`, compiled when it first meets a shape.

    Differs: PyTorch compiles nothing.
    """
    return tf.function(functools.partial(_log_probabilities, model), jit_compile=True, autograph=False)


def _log_probabilities(
    model: TFXGLMForCausalLM,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor,
    sources: tf.Tensor,
    targets: tf.Tensor,
    filled: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """See `ScoringEngine.log_probabilities`; [chunks, chunk], of which the first `filled` chunks count."""
    results = model.model(DecoderInputs(input_ids, attention_mask), None, Wanted())
    states = tf.reshape(results.last_hidden_state, (-1, model.config.d_model))
    head, tied = model.lm_head, model.lm_head is None
    matrix = tf.convert_to_tensor(model.model.embed_tokens.embeddings if head is None else head.kernel)

    def step(index: tf.Tensor, scores: tf.Tensor, likeliest: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        new = _of_targets(matrix, tied, tf.gather(states, sources[index]), targets[index])
        return index + 1, *(
            tf.tensor_scatter_nd_update(old, [[index]], part[None])
            for old, part in zip((scores, likeliest), new, strict=True)
        )

    nothing = (0, tf.zeros(sources.shape), tf.zeros(sources.shape, tf.int32))
    _, scores, likeliest = tf.while_loop(lambda index, *_: index < filled, step, nothing)
    return scores, likeliest


def _of_targets(matrix: tf.Tensor, tied: bool, states: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The log-probability of each target, float32 [positions]; and the id with the largest logit, int32 [positions].

    Of several such ids it is the lowest.

    Args:
        matrix: the embedding [vocab_size, d_model] if it is `tied`, else a head [d_model, vocab_size].
        tied: which of the two it is.
        states: [positions, d_model].
        targets: int32 [positions].
    """
    vocab_size, width = matrix.shape if tied else matrix.shape[::-1]
    tile = min(engine.TILE_VOCABULARY, vocab_size)

    def step(index: tf.Tensor, *found: tf.Tensor) -> Any:
        # The last tile is a full one, too, and repeats some of the one before.
        begin = tf.minimum(index * tile, vocab_size - tile)
        # All sizes are given: where XLA has to find one itself, it pads the whole matrix to twice its size.
        part = tf.slice(matrix, (begin, 0), (tile, width)) if tied else tf.slice(matrix, (0, begin), (width, tile))
        logits = tf.cast(tf.matmul(states, tf.cast(part, states.dtype), transpose_b=tied), tf.float32)
        return index + 1, *engine.with_tile(selection, found, logits, targets, begin, index * tile)

    zeros, tiles = tf.zeros(targets.shape), -(-vocab_size // tile)
    begin = (0, zeros - np.inf, zeros, zeros - np.inf, tf.zeros_like(targets))
    _, log_sum_exp, own_logit, _, likeliest = tf.while_loop(lambda index, *_: index < tiles, step, begin)
    return own_logit - log_sum_exp, likeliest
