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

# TensorFlow keeps about as much beside the logits of a chunk, in buffers of its products and in the compiled graph. So
# these take half of the room that there is.
_LOGITS = 2
# Of the head's gradient: what of a chunk's part is computed before it is added to the rest, where products cannot add.
# XLA compiles each of them.
_TILE_BYTES, _XLA_TILE_BYTES = 2**22, 2**24


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
        training: whether to compute the gradients along with the loss. Differs: TensorFlow does not tell beforehand
            whether there will be a call for them. Without this they are computed when it comes, with the logits again.
        train_head: whether the head has a gradient.

    Returns:
        See `LossOutput`: zeros if no label counts.

    Raises:
        InputError: second derivatives are asked for; or, outside a `tf.function`, could be asked for, as a tape records
            how the gradient of another tape is computed.
    """
    tied = not isinstance(head, keras.layers.Dense)
    matrix = tf.convert_to_tensor(head if tied else head.kernel)
    targets, factors = targets_and_weights(labels, weights)
    count = tf.reduce_sum(factors)
    divisor = count if num_items_in_batch is None else tf.cast(num_items_in_batch, tf.float32)
    states = tf.reshape(hidden_states, (-1, hidden_states.shape[-1]))
    targets, factors = tf.reshape(targets, (-1,)), tf.reshape(factors, (-1,))
    if not states.shape[0]:  # Unknown, or none: what a replica gets of few rows. Then one that does not count.
        more = tf.cast(tf.shape(states)[0] == 0, tf.int32)
        states = tf.pad(states, ((0, more), (0, 0)))
        targets, factors = tf.pad(targets, ((0, more),)), tf.pad(factors, ((0, more),))
    loss, surprisal, correct = (_sums_eager if tf.executing_eagerly() else _sums_traced)(
        states,
        matrix,
        targets,
        factors,
        tf.math.divide_no_nan(1.0, divisor),
        shape=tuple(matrix.shape),
        tied=tied,
        smoothing=float(options.label_smoothing),
        z_loss=float(options.z_loss),
        # Differs: not more on accelerators, as a graph may run on another device than the one where it is made.
        chunk=max(1, chunk_positions(matrix.shape[0 if tied else 1]) // _LOGITS),
        training=training,
        train_head=train_head,
        xla=in_xla(),
        fused=products_add(),
    )
    return LossOutput(loss, tf.stop_gradient(surprisal), tf.stop_gradient(correct), tf.stop_gradient(count))


def counted_labels(labels: tf.Tensor, attention_mask: tf.Tensor | None) -> tf.Tensor:
    """See `xglm_core.loss.counted_labels`."""
    labels = tf.cast(labels, tf.int32)  # Which a label of 8 bits without a sign needs to become -100.
    if attention_mask is None:
        return labels
    padding = tf.convert_to_tensor(attention_mask)[:, -keras.ops.shape(labels)[1] :] == 0
    return tf.where(tf.pad(padding[:, :-1], ((0, 0), (1, 0))), IGNORED_LABEL, labels)


def targets_and_weights(labels: tf.Tensor, weights: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """What each position predicts, int32, and how much that counts, float32, each [batch, length]; 0 where it does not.

    Args:
        labels, weights: see `causal_lm_loss`.
    """
    targets = tf.pad(tf.cast(labels, tf.int32)[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    counts = targets != IGNORED_LABEL
    given = 1.0 if weights is None else tf.pad(tf.cast(weights, tf.float32)[:, 1:], ((0, 0), (0, 1)))
    return tf.where(counts, targets, 0), tf.where(counts, given, 0.0)


def _sums(
    states: tf.Tensor, matrix: tf.Tensor, targets: tf.Tensor, factors: tf.Tensor, inverse: tf.Tensor, **static: Any
) -> tuple[tf.Tensor, ...]:
    """Loss, surprisal and number of correct predictions, with the gradients of the first; see `_in_chunks`."""
    training = static.pop("training")
    train_head = static.pop("train_head")

    @tf.custom_gradient
    def sums(states: tf.Tensor, matrix: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Callable[..., Any]]:
        run = functools.partial(_in_chunks, states, matrix, targets, factors, inverse, **static)
        results, computed = run(gradients=training, head_gradient=training and train_head)
        # A persistent tape would keep what second derivatives of these need, all logits among it.
        computed = tuple(map(tf.stop_gradient, computed))

        def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
            of_states, *of_head = computed or run(gradients=True, head_gradient=train_head)[1]
            # Scaled in float32: in float16 they might be 0 before a loss scale takes effect.
            of_states = tf.cast(of_states * upstream, states.dtype)
            return _final(of_states), _final(tf.cast(of_head[0] * upstream, matrix.dtype)) if of_head else None

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
# all its weights. Eager calls share a program among all numbers of positions; a traced one belongs to shapes it knows.
_sums_eager = tf.function(_sums, autograph=False, reduce_retracing=True)
_sums_traced = tf.function(_sums, autograph=False)


def _in_chunks(
    states: tf.Tensor,
    matrix: tf.Tensor,
    targets: tf.Tensor,
    factors: tf.Tensor,
    inverse: tf.Tensor,
    *,
    shape: tuple[int, int],
    tied: bool,
    smoothing: float,
    z_loss: float,
    chunk: int,
    xla: bool,
    fused: bool,
    gradients: bool,
    head_gradient: bool,
) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    """The sums over all positions, a chunk of them at a time.

    Args:
        states: [positions, d_model].
        matrix: the embedding [vocab_size, d_model] if it is `tied`, else a head [d_model, vocab_size].
        targets: int32 [positions], of the vocabulary.
        factors: the weights of the targets, float32 [positions]; those that are 0 are skipped.
        inverse: what the sum of the losses is multiplied by, float32 scalar.
        shape: that of the matrix. It is said because a program for any number of positions is one for any matrix, too.
        tied: see `matrix`.
        smoothing, z_loss: see `LossOptions`.
        chunk: positions at a time, at most.
        xla: whether XLA will compile this.
        fused: see `products_add`.
        gradients, head_gradient: whether to compute the gradient of the states, and that of the matrix.

    Returns:
        Loss, surprisal and correct predictions, float32 scalars; and the gradients that were asked for, in float32.
    """
    positions = keras.ops.shape(states)[0]
    vocab_size, width = shape if tied else shape[::-1]
    # A product of bfloat16 with a float32 result is unknown to TensorFlow. (Nothing happens to a float32 matrix.)
    matrix = tf.cast(matrix, tf.float32)
    needed = factors != 0
    size = min(chunk, positions) if isinstance(positions, int) else tf.minimum(chunk, positions)
    chunks = -(-positions // size)
    # What counts comes first, in order; then the rest, which no chunk in use meets but the last.
    numbers = tf.range(positions)
    order = tf.sort(tf.where(needed, numbers, numbers + positions)) % positions
    places = tf.reshape(tf.pad(order, ((0, chunks * size - positions),)), (chunks, size))
    counting = tf.math.count_nonzero(needed, dtype=tf.int32)

    def step(index: tf.Tensor, loss: tf.Tensor, surprisal: tf.Tensor, correct: tf.Tensor, *sums: tf.Tensor) -> Any:
        """One chunk; the first is given no sums of gradients."""
        with tf.control_dependencies(sums):  # Else two chunks' logits would be there at a time.
            place = places[index]
        counts = index * size + tf.range(size) < counting
        factor = tf.where(counts, tf.gather(factors, place), 0.0)
        # A state that does not count may be anything.
        rows = tf.cast(tf.gather(states, place), tf.float32)
        columns = tf.where(counts, tf.transpose(rows), 0.0)
        rows = tf.where(counts[:, None], rows, 0.0)
        target = tf.gather(targets, place)

        # The vocabulary comes first, for which the products are faster, and parts of it lie together in memory. So
        # they are of columns, which TensorFlow would make rows again were they transposed in the next operation.
        logits = tf.matmul(matrix, columns, transpose_a=not tied)
        largest, of_target = tf.reduce_max(logits, axis=0), tf.gather_nd(logits, tf.stack([target, tf.range(size)], 1))
        mean = tf.reduce_mean(logits, axis=0) if smoothing else tf.zeros_like(largest)
        # When nothing else needs the logits, their memory becomes that of the exponentials, and so on.
        with tf.control_dependencies([of_target, mean]):
            powers = tf.exp(logits - largest)
        total = tf.reduce_sum(powers, axis=0)
        log_total = largest + tf.math.log(total)
        losses = log_total - (1 - smoothing) * of_target - smoothing * mean + z_loss * log_total**2
        results = (
            index + 1,
            loss + inverse * tf.reduce_sum(factor * losses),
            surprisal + tf.reduce_sum(factor * (log_total - of_target)),
            correct + tf.reduce_sum(tf.where(of_target == largest, factor, 0.0)),
        )
        if not gradients:
            return results

        factor *= inverse
        slopes = powers * (factor * (1 + 2 * z_loss * log_total) / total)
        if smoothing:
            slopes -= factor * smoothing / vocab_size
        # What is due to the target's own logit is added in rows: to change single numbers would copy all of them.
        own = (factor * (smoothing - 1))[:, None]
        of_target = own * (tf.gather(matrix, target) if tied else tf.transpose(tf.gather(matrix, target, axis=1)))
        of_rows = tf.matmul(slopes, matrix, transpose_a=True, transpose_b=not tied) + of_target
        of_states, *of_head = sums or [tf.zeros((chunks, size, width))]
        of_states = tf.tensor_scatter_nd_update(of_states, [[index]], of_rows[None])
        if not head_gradient:
            return *results, of_states
        if not of_head:
            of_matrix = tf.matmul(slopes, rows)
        else:
            of_matrix = _product_added(of_head[0], slopes, rows, index, xla, fused)
        return *results, of_states, rows_added(of_matrix, target, own * rows, xla)

    nothing = tf.constant(0.0)
    results = step(tf.constant(0), nothing, nothing, nothing)
    if not isinstance(chunks, int) or chunks > 1:
        used = -(-counting // size)
        results = tf.while_loop(lambda index, *_: index < used, step, results, parallel_iterations=1)
    _, loss, surprisal, correct, *sums = results
    if not gradients:
        return (loss, surprisal, correct), ()
    # Back in the order of the positions.
    rank = tf.maximum(tf.cumsum(tf.cast(needed, tf.int32)) - 1, 0)
    of_states = tf.gather(tf.reshape(sums[0], (chunks * size, width)), rank)
    computed = [tf.where(needed[:, None], of_states, 0.0)]
    if head_gradient:
        computed.append(sums[1] if tied else tf.transpose(sums[1]))
    return (loss, surprisal, correct), tuple(computed)


def _product_added(
    total: tf.Tensor, slopes: tf.Tensor, rows: tf.Tensor, index: tf.Tensor, xla: bool, fused: bool
) -> tf.Tensor:
    """Total + slopes rows, in place, and without a whole product in memory.

    Args:
        total: [vocab_size, d_model].
        slopes: [vocab_size, positions].
        rows: [positions, d_model].
        index: the number of the chunk.
        xla, fused: which of three forms to use: see `_in_chunks`. Each is slow where another is fast.
    """
    vocab_size, width = total.shape
    if fused and not xla and not tf.executing_eagerly():
        # One operation, which adds to the memory of its last operand. It asks for a bias, and for one that is not
        # known to be 0: that would be left out, and the rest be two operations.
        bias = tf.fill((width,), tf.cast(tf.minimum(index, 0), tf.float32))
        return tf.nn.bias_add(tf.matmul(slopes, rows), bias) + total
    height = max(1, (_XLA_TILE_BYTES if xla else _TILE_BYTES) // (4 * width))
    if xla:
        for begin in range(0, vocab_size, height):
            with tf.control_dependencies([total]):  # One tile after the other.
                tile = tf.matmul(slopes[begin : begin + height], rows)
            total = _updated(total, begin, tile)
        return total

    def step(begin: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tile = tf.matmul(slopes[begin : begin + height], rows)
        places = tf.range(begin, begin + tf.shape(tile)[0])
        # This writes to its operand whatever else holds it. Nothing does, and it needs no copy of the old numbers.
        return begin + height, tf.raw_ops.InplaceAdd(x=total, i=places, v=tile)

    # One is added while the next is computed.
    _, total = tf.while_loop(lambda begin, _: begin < vocab_size, step, (0, total), parallel_iterations=2)
    return total


@functools.cache
def products_add() -> bool:
    """Whether a graph's product with a bias and a sum is one operation: on CPUs, where oneDNN computes products."""
    try:
        from tensorflow.python.util._pywrap_util_port import IsMklEnabled
    except ImportError:  # The module is not a public one.
        return False
    return IsMklEnabled() and not tf.config.list_logical_devices("GPU") and not tf.config.list_logical_devices("TPU")


def in_xla() -> bool:
    """Whether XLA will compile what is traced now."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def rows_added(matrix: tf.Tensor, index: tf.Tensor, rows: tf.Tensor, xla: bool) -> tf.Tensor:
    """A matrix with rows added to those of an index, which may repeat; in place."""
    if xla:
        return tf.tensor_scatter_nd_add(matrix, index[:, None], rows)
    # The same operation would copy the matrix here.
    width = matrix.shape[1]

    def step(number: tf.Tensor, flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return number + 1, _updated(flat, index[number] * width, rows[number])

    count = tf.shape(index)[0]
    flat = tf.reshape(matrix, (-1,))
    _, flat = tf.while_loop(lambda number, _: number < count, step, (0, flat), parallel_iterations=1)
    return tf.reshape(flat, matrix.shape)


def _updated(total: tf.Tensor, begin: int | tf.Tensor, more: tf.Tensor) -> tf.Tensor:
    """`total` with `more` added from row `begin` on; in place where nothing else holds `total`."""
    height = more.shape[0]
    old = tf.slice(total, [begin, *[0] * (len(more.shape) - 1)], more.shape)
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=total, begin=[begin], end=[begin + height], strides=[1], value=old + more
    )
