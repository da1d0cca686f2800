"""The training loss, from the states below the head: some positions at a time, so that all logits never exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from xglm_core.inputs import IGNORED_LABEL
from xglm_core.loss import LossOptions, LossOutput, chunk_positions

# Of the head's gradient, float32: what is computed before it is added to the rest.
_TILE_BYTES = 2**26


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
    """
    tied = not isinstance(head, keras.layers.Dense)
    matrix = tf.convert_to_tensor(head if tied else head.kernel)
    labels = tf.cast(labels, tf.int32)
    targets = tf.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    counts = targets != IGNORED_LABEL
    given = 1.0 if weights is None else tf.pad(tf.cast(weights, tf.float32)[:, 1:], ((0, 0), (0, 1)))
    factors = tf.where(counts, given, 0.0)
    count = tf.reduce_sum(factors)
    divisor = count if num_items_in_batch is None else tf.cast(num_items_in_batch, tf.float32)
    loss, surprisal, correct = (_sums_eager if tf.executing_eagerly() else _sums_traced)(
        tf.reshape(hidden_states, (-1, hidden_states.shape[-1])),
        matrix,
        tf.reshape(tf.where(counts, targets, 0), (-1,)),
        tf.reshape(factors, (-1,)),
        tf.math.divide_no_nan(1.0, divisor),
        shape=tuple(matrix.shape),
        tied=tied,
        smoothing=float(options.label_smoothing),
        z_loss=float(options.z_loss),
        chunk=chunk_positions(matrix.shape[0 if tied else 1]),
        training=training,
        train_head=train_head,
    )
    return LossOutput(loss, tf.stop_gradient(surprisal), tf.stop_gradient(correct), tf.stop_gradient(count))


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

        def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
            of_states, *of_head = computed or run(gradients=True, head_gradient=train_head)[1]
            # Scaled in float32: in float16 they might be 0 before a loss scale takes effect.
            of_states = tf.cast(of_states * upstream, states.dtype)
            return of_states, tf.cast(of_head[0] * upstream, matrix.dtype) if of_head else None

        return results, gradient

    return sums(states, matrix)


# TensorFlow never forgets a graph in which it met a custom gradient. Here it meets a small one, not the caller's with all
# its weights. Eager calls share one program among all numbers of positions; a traced one belongs to shapes that are known.
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
        gradients, head_gradient: whether to compute the gradient of the states, and that of the matrix.

    Returns:
        Loss, surprisal and correct predictions, float32 scalars; and the gradients that were asked for, in float32.
    """
    positions = keras.ops.shape(states)[0]
    vocab_size, width = shape if tied else shape[::-1]
    needed = factors != 0
    size = min(chunk, positions) if isinstance(positions, int) else tf.minimum(chunk, positions)
    chunks = -(-positions // size)
    # What counts comes first, in order; then the rest, which no chunk in use meets but the last.
    numbers = tf.range(positions)
    order = tf.sort(tf.where(needed, numbers, numbers + positions)) % positions
    places = tf.reshape(tf.pad(order, ((0, chunks * size - positions),)), (chunks, size))
    counting = tf.math.count_nonzero(needed, dtype=tf.int32)
    used = -(-counting // size)

    tiles = _tiles(vocab_size, 4 * width)
    begins = range(0, vocab_size, -(-vocab_size // tiles))

    def part(begin: int) -> tf.Tensor:
        """A tile of the head, float32; a view of the matrix if that is tied and float32."""
        rows = min(begins.step, vocab_size - begin)
        tile = tf.slice(matrix, (begin, 0), (rows, width)) if tied else tf.slice(matrix, (0, begin), (width, rows))
        return tf.cast(tile, tf.float32)

    def step(index: tf.Tensor, loss: tf.Tensor, surprisal: tf.Tensor, correct: tf.Tensor, *sums: tf.Tensor) -> Any:
        place = places[index]
        counts = index * size + tf.range(size) < counting
        factor = tf.where(counts, tf.gather(factors, place), 0.0)
        # A state that does not count may be anything.
        rows = tf.where(counts[:, None], tf.cast(tf.gather(states, place), tf.float32), 0.0)
        target = tf.gather(targets, place)

        logits = []
        for begin in begins:
            with tf.control_dependencies(logits[-1:]):  # Else the executor may hold a converted copy of each tile.
                logits.append(tf.matmul(rows, part(begin), transpose_b=tied))
        inside = [(target >= begin) & (target < begin + begins.step) for begin in begins]
        column = [
            tf.clip_by_value(target - begin, 0, tile.shape[1] - 1) for begin, tile in zip(begins, logits, strict=True)
        ]
        largest = functools.reduce(tf.maximum, [tf.reduce_max(tile, axis=1) for tile in logits])
        of_target = tf.add_n(
            [
                tf.where(here, tf.gather(tile, where, batch_dims=1), 0.0)
                for here, where, tile in zip(inside, column, logits, strict=True)
            ]
        )
        mean = tf.add_n([tf.reduce_sum(tile, axis=1) for tile in logits]) / vocab_size if smoothing else 0.0
        # When nothing else needs the logits, their memory is that of the exponentials.
        with tf.control_dependencies([of_target, mean] if smoothing else [of_target]):
            powers = [tf.exp(tile - largest[:, None]) for tile in logits]
        total = tf.add_n([tf.reduce_sum(tile, axis=1) for tile in powers])
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
        slope = (factor * (1 + 2 * z_loss * log_total) / total)[:, None]
        of_states, *of_head = sums
        of_rows = tf.zeros_like(rows)
        for number, (begin, power, here, where) in enumerate(zip(begins, powers, inside, column, strict=True)):
            with tf.control_dependencies([of_rows, *of_head]):  # One tile after the other.
                slopes = power * slope
            if smoothing:
                slopes -= (factor * smoothing / vocab_size)[:, None]
            entries = tf.stack([tf.range(size), where], axis=1)
            slopes = tf.tensor_scatter_nd_sub(slopes, entries, tf.where(here, factor * (1 - smoothing), 0.0))
            of_rows += tf.matmul(slopes, part(begin), transpose_b=not tied)
            if head_gradient:
                of_tile = tf.matmul(slopes, rows, transpose_a=True)
                missing = begins.step - power.shape[1]
                of_tile = tf.pad(of_tile, ((0, missing), (0, 0))) if missing else of_tile
                # In place, as TensorFlow does it where nothing else holds the old tensor, and XLA.
                of_head = [tf.tensor_scatter_nd_add(of_head[0], [[number]], of_tile[None])]
        of_states = tf.tensor_scatter_nd_update(of_states, [[index]], of_rows[None])
        return *results, of_states, *of_head

    nothing = tf.constant(0.0)
    sums = [tf.zeros((chunks, size, width))] if gradients else []
    sums += [tf.zeros((tiles, begins.step, width))] if head_gradient else []
    _, *results = tf.while_loop(
        lambda index, *_: index < used, step, (0, nothing, nothing, nothing, *sums), parallel_iterations=1
    )
    values, sums = tuple(results[:3]), results[3:]
    if not gradients:
        return values, ()
    # Back in the order of the positions.
    rank = tf.maximum(tf.cumsum(tf.cast(needed, tf.int32)) - 1, 0)
    of_states = tf.gather(tf.reshape(sums[0], (chunks * size, width)), rank)
    computed = [tf.where(needed[:, None], of_states, 0.0)]
    if head_gradient:
        of_matrix = tf.reshape(sums[1], (tiles * begins.step, width))[:vocab_size]
        computed.append(of_matrix if tied else tf.transpose(of_matrix))
    return values, tuple(computed)


def _tiles(vocab_size: int, row_bytes: int) -> int:
    """In how many parts the head is taken; if possible, parts of the same size."""
    fewest = -(-vocab_size * row_bytes // _TILE_BYTES)
    even = (tiles for tiles in range(fewest, 2 * fewest) if vocab_size % tiles == 0)
    return next(even, fewest)
