"""The training loss, from the states below the head: some positions at a time, so that all logits never exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from xglm_core.errors import InputError
from xglm_core.inputs import IGNORED_LABEL
from xglm_core.loss import LossOptions, LossOutput, chunk_positions
from xglm_tf.fast.adding import compiles, product_added, rows_added

# TensorFlow keeps about as much beside the logits of a chunk, in buffers of its products and in the compiled graph. So
# these take half of the room that there is.
_LOGITS = 2


def causal_lm_loss(
    hidden_states: tf.Tensor,
    head: Any,
    labels: tf.Tensor,
    num_items_in_batch: int | tf.Tensor | None = None,
    *,
    options: LossOptions,
    weights: tf.Tensor | None = None,
    training: bool = False,
    train_head: bool = True,
) -> LossOutput:
    """Cross-entropy of each next token, in float32 whatever the type of states and head.

    The loss alone has gradients, and those once: they have none themselves.

    Args:
        hidden_states: what the head reads [batch, length, d_model].
        head: the embedding matrix [vocab_size, d_model] of a tied head, or a `Dense` layer without bias.
        labels: the tokens themselves, integers [batch, length]: position i is judged by label i + 1, the last by none;
            -100 does not count.
        num_items_in_batch: what to divide the sum by; None takes the sum of the weights that count.
        options: what is added to the cross-entropy.
        weights: of the labels, [batch, length]; None means 1.
        training: whether to compute the gradients along with the loss. Without it they are computed when they are
            asked for, with the logits again. Differs: PyTorch tells beforehand whether gradients will be asked for.
        train_head: whether the head has a gradient.

    Returns:
        See `LossOutput`: zeros if no label counts.

    Raises:
        InputError: second derivatives are asked for; or, outside a `tf.function`, could be asked for, as a tape records
            how the gradient of another tape is computed.
    """
    tied = not isinstance(head, keras.layers.Dense)
    matrix = tf.convert_to_tensor(head if tied else head.kernel)
    targets, loss_weights = targets_and_weights(labels, weights)
    count = tf.reduce_sum(loss_weights)
    divisor = count if num_items_in_batch is None else tf.cast(num_items_in_batch, tf.float32)
    states = tf.reshape(hidden_states, (-1, hidden_states.shape[-1]))
    targets, loss_weights = tf.reshape(targets, (-1,)), tf.reshape(loss_weights, (-1,))
    if not states.shape[0]:  # Unknown, or none: what a replica gets of few rows. Then one that does not count.
        more = tf.cast(tf.shape(states)[0] == 0, tf.int32)
        states = tf.pad(states, ((0, more), (0, 0)))
        targets, loss_weights = tf.pad(targets, ((0, more),)), tf.pad(loss_weights, ((0, more),))
    sums = (_sums_eager if tf.executing_eagerly() else _sums_traced)(
        states,
        matrix,
        targets,
        loss_weights,
        tf.math.divide_no_nan(1.0, divisor),
        shape=tuple(matrix.shape),
        tied=tied,
        smoothing=float(options.label_smoothing),
        z_loss=float(options.z_loss),
        # Differs: the same on accelerators, where the other backends take more: a graph may run on another device than
        # the one where it is made.
        chunk=max(1, chunk_positions(matrix.shape[0 if tied else 1]) // _LOGITS),
        training=training,
        train_head=train_head,
        xla=compiles(),
    )
    surprisal, correct, count = map(tf.stop_gradient, (sums[1], sums[2], count))
    return LossOutput(sums[0], surprisal, correct, count)


def counted_labels(labels: tf.Tensor, attention_mask: tf.Tensor | None) -> tf.Tensor:
    """See `xglm_core.loss.counted_labels`."""
    labels = tf.cast(labels, tf.int32)  # Which a label of 8 bits without a sign needs to become -100.
    if attention_mask is None:
        return labels
    padding = tf.convert_to_tensor(attention_mask)[:, -keras.ops.shape(labels)[1] :] == 0
    return tf.where(tf.pad(padding[:, :-1], ((0, 0), (1, 0))), IGNORED_LABEL, labels)


def targets_and_weights(labels: tf.Tensor, weights: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """What each position predicts, int32, and how much that counts, float32, each [batch, length]; 0 where it does not.

    Differs: PyTorch and Flax need this only within `causal_lm_loss`; here, `fit` needs it as well.

    Args:
        labels, weights: see `causal_lm_loss`.
    """
    targets = tf.pad(tf.cast(labels, tf.int32)[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    counts = targets != IGNORED_LABEL
    given = 1.0 if weights is None else tf.pad(tf.cast(weights, tf.float32)[:, 1:], ((0, 0), (0, 1)))
    return tf.where(counts, targets, 0), tf.where(counts, given, 0.0)


def _sums(
    states: tf.Tensor,
    matrix: tf.Tensor,
    targets: tf.Tensor,
    loss_weights: tf.Tensor,
    scale: tf.Tensor,
    *,
    training: bool,
    train_head: bool,
    **static: Any,
) -> tf.Tensor:
    """Loss, surprisal and number of correct predictions [3], with the gradients of the first; see `_in_chunks`."""

    @tf.custom_gradient
    def sums(states: tf.Tensor, matrix: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        run = functools.partial(_in_chunks, states, matrix, targets, loss_weights, scale, **static)
        results, *gradients = run(with_gradients=training, with_head=training and train_head)
        # A persistent tape would keep what second derivatives of these need, all logits among it.
        gradients = list(map(tf.stop_gradient, gradients))

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
            grad_states, *grad_head = gradients or run(with_gradients=True, with_head=train_head)[1:]
            # Scaled in float32: in float16 they might be 0 before a loss scale takes effect.
            grad_states = tf.cast(grad_states * upstream[0], states.dtype)
            return _final(grad_states), _final(tf.cast(grad_head[0] * upstream[0], matrix.dtype)) if grad_head else None

        return results, gradient

    return sums(states, matrix)


@tf.custom_gradient
def _final(gradient: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
    """The same tensor, which has no gradient."""

    def refuse(*_: tf.Tensor) -> Any:
        raise InputError(
            "the loss has no second derivatives, but there is a tape around the gradient of another, or a forward "
            "accumulator; compute the loss from the logits of a call without labels"
        )

    return gradient, refuse


# TensorFlow never forgets a graph in which it met a custom gradient. Here it meets a small one, not the caller's with
# all its weights. Eager calls of any length share a program; traced calls have one for each shape.
_sums_eager = tf.function(_sums, autograph=False, reduce_retracing=True)
_sums_traced = tf.function(_sums, autograph=False)


def _in_chunks(
    states: tf.Tensor,
    matrix: tf.Tensor,
    targets: tf.Tensor,
    loss_weights: tf.Tensor,
    scale: tf.Tensor,
    *,
    shape: tuple[int, int],
    tied: bool,
    chunk: int,
    xla: bool,
    with_gradients: bool,
    with_head: bool,
    **options: float,
) -> tuple[tf.Tensor, ...]:
    """The sums over all positions, a chunk of them at a time.

    Args:
        states: [positions, d_model].
        matrix: the embedding [vocab_size, d_model] if it is `tied`, else a head [d_model, vocab_size].
        targets: int32 [positions], of the vocabulary.
        loss_weights: of the targets, float32 [positions]; those that are 0 are skipped.
        scale: what the sum of the losses is multiplied by, float32 scalar.
        shape: that of the matrix, passed statically: with dynamic positions TensorFlow also loses the matrix shape.
        tied: see `matrix`.
        chunk: positions at a time, at most.
        xla: see `compiles`.
        with_gradients, with_head: whether to compute the gradient of the states, and that of the matrix.
        options: see `LossOptions`.

    Returns:
        Loss, surprisal and correct predictions [3]; then the gradients that were asked for; all in float32.
    """
    positions, width = keras.ops.shape(states)[0], shape[1 if tied else 0]
    # A product of bfloat16 with a float32 result is unknown to TensorFlow. (Nothing happens to a float32 matrix.)
    matrix = tf.cast(matrix, tf.float32)
    size = min(chunk, positions) if isinstance(positions, int) else tf.minimum(chunk, positions)
    chunks, needed = -(-positions // size), loss_weights != 0
    places = tf.reshape(tf.pad(_counting_first(needed), ((0, chunks * size - positions),)), (chunks, size))
    counting = tf.math.count_nonzero(needed, dtype=tf.int32)

    def step(index: tf.Tensor, sums: tf.Tensor, *gradients: tf.Tensor) -> Any:
        """One chunk; the first is given no gradients."""
        with tf.control_dependencies(gradients):  # Else two chunks' logits would be there at a time.
            place = places[index]
        counts = index * size + tf.range(size) < counting
        rows = tf.cast(tf.gather(states, place), tf.float32)
        # A state that does not count may be anything.
        columns, rows = tf.where(counts, tf.transpose(rows), 0.0), tf.where(counts[:, None], rows, 0.0)
        weights = tf.where(counts, tf.gather(loss_weights, place), 0.0)
        target = tf.gather(targets, place)
        new, *of_logits = _chunk(matrix, columns, target, weights, scale, tied, with_gradients, **options)
        if not with_gradients:
            return index + 1, sums + new
        grad_logits, grad_own, grad_rows = of_logits
        grad_states, *grad_head = gradients or [tf.zeros((chunks, size, width))]
        results = index + 1, sums + new, tf.tensor_scatter_nd_update(grad_states, [[index]], grad_rows[None])
        if not with_head:
            return results
        added: Any = functools.partial(product_added, grad_head[0], xla=xla) if grad_head else tf.matmul
        grad_matrix = added(grad_logits, rows)
        return *results, rows_added(grad_matrix, target, grad_own * rows, xla=xla)

    results = step(tf.constant(0), tf.zeros(3))
    if not isinstance(chunks, int) or chunks > 1:
        used = -(-counting // size)
        results = tf.while_loop(lambda index, *_: index < used, step, results, parallel_iterations=1)
    _, sums, *gradients = results
    if with_gradients:  # Back in the order of the positions.
        rank = tf.maximum(tf.cumsum(tf.cast(needed, tf.int32)) - 1, 0)
        grad_states = tf.gather(tf.reshape(gradients[0], (chunks * size, width)), rank)
        gradients[0] = tf.where(needed[:, None], grad_states, 0.0)
    if with_head and not tied:
        gradients[1] = tf.transpose(gradients[1])
    return sums, *gradients


def _counting_first(needed: tf.Tensor) -> tf.Tensor:
    """The positions, int32: first those that are needed, in order; then the rest, which only the last chunk meets."""
    numbers, positions = tf.range(tf.size(needed)), tf.size(needed)
    return tf.sort(tf.where(needed, numbers, numbers + positions)) % positions


def _chunk(
    matrix: tf.Tensor,
    columns: tf.Tensor,
    target: tf.Tensor,
    weights: tf.Tensor,
    scale: tf.Tensor,
    tied: bool,
    with_gradients: bool,
    *,
    smoothing: float,
    z_loss: float,
) -> tuple[tf.Tensor, ...]:
    """The sums over one chunk.

    Args:
        matrix, scale, tied: see `_in_chunks`.
        columns: states, float32 [d_model, size]. TensorFlow would undo a transpose right before the product.
        target: int32 [size].
        weights: of the targets, float32 [size].
        with_gradients: whether to return more than sums.
        smoothing, z_loss: see `LossOptions`.

    Returns:
        Loss, surprisal and correct predictions [3]. `with_gradients` also the gradient of the logits [vocab_size,
        size], but for what is due to the target's own; this [size, 1]; and that of the states [size, d_model].
    """
    # The vocabulary comes first, for which the products are faster, and parts of it lie together in memory.
    logits = tf.matmul(matrix, columns, transpose_a=not tied)
    max_logit = tf.reduce_max(logits, axis=0)
    own_logit = tf.gather_nd(logits, tf.stack([target, tf.range(tf.size(target))], 1))
    mean = tf.reduce_mean(logits, axis=0) if smoothing else tf.zeros_like(max_logit)
    # When nothing else needs the logits, their memory becomes that of the exponentials, and so on.
    with tf.control_dependencies([own_logit, mean]):
        exp_logits = tf.exp(logits - max_logit)
    sum_exp = tf.reduce_sum(exp_logits, axis=0)
    log_sum_exp = max_logit + tf.math.log(sum_exp)
    losses = log_sum_exp - (1 - smoothing) * own_logit - smoothing * mean + z_loss * log_sum_exp**2
    correct = tf.cast(own_logit == max_logit, tf.float32)
    of_positions = tf.stack([losses, log_sum_exp - own_logit, correct])
    sums = tf.reduce_sum(weights * of_positions, axis=1) * tf.stack([scale, 1.0, 1.0])
    if not with_gradients:
        return (sums,)
    weights *= scale
    grad_logits = exp_logits * (weights * (1 + 2 * z_loss * log_sum_exp) / sum_exp)
    if smoothing:
        grad_logits -= weights * smoothing / tf.cast(tf.shape(logits)[0], tf.float32)
    # What is due to the target's own logit is added in rows: to change single elements would copy all of them.
    grad_own = (weights * (smoothing - 1))[:, None]
    own_rows = tf.gather(matrix, target) if tied else tf.transpose(tf.gather(matrix, target, axis=1))
    grad_rows = tf.matmul(grad_logits, matrix, transpose_a=True, transpose_b=not tied) + grad_own * own_rows
    return sums, grad_logits, grad_own, grad_rows
