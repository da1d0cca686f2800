"""The training loss, and its gradients in the same pass, chunk by chunk of the positions."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from xglm_core.inputs import IGNORED_LABEL
from xglm_core.loss import LossOptions, LossOutput, chunk_positions
from xglm_flax.attention import computed, precision
from xglm_flax.cache import Length

_PLAIN = LossOptions()
# XLA computes a term of a sum before it adds it. So logits take half of the room that there is for them, and what a
# chunk adds to the gradient of the head is computed in parts. One CPU takes some words at a time, which lie together.
# Where several devices may divide the words, it is some columns, a quarter of the room but no fewer than 32, which
# would be slow. On accelerators all columns have room, and products of some take three times as long.
_LOGITS, _TERM, _COLUMNS, _WORDS = 2, 4, 32, 1024


class _Static(NamedTuple):
    """What is compiled: the options, positions of a chunk in each group, and see `causal_lm_loss`."""

    options: LossOptions
    chunk: int
    vocabulary_axis: int
    sharded: bool


class _Data(NamedTuple):
    """What has no gradients: targets int32 and factors float32, each [groups, positions], and chunks to compute."""

    targets: jax.Array
    factors: jax.Array
    chunks: jax.Array


def causal_lm_loss(
    hidden_states: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    num_items_in_batch: int | jax.Array | None = None,
    *,
    options: LossOptions = _PLAIN,
    weights: jax.Array | None = None,
    vocabulary_axis: int = 0,
    shards: int | None = None,
) -> LossOutput:
    """Cross-entropy of each next token, in float32, without holding all logits.

    Differs: no backward pass but a rule for both modes of differentiation. The gradients are computed where the loss
    is, if any are wanted; the tangent of the loss is their product with those of the states and the head.

    Args:
        hidden_states: [batch, length, d_model]; their type is that of the products.
        head: [vocab_size, d_model], or with `vocabulary_axis=1` a kernel [d_model, vocab_size], of any type.
        labels: the tokens themselves, integers [batch, length]: position i is judged by label i + 1, the last by none;
            -100 does not count.
        num_items_in_batch: what to divide the sum by; None divides by the sum of the weights of what counts.
        options: what is added to the cross-entropy.
        weights: a factor for each label, [batch, length], without gradients; None means 1.
        vocabulary_axis: which axis of `head` is the vocabulary's.
        shards: among how many groups of devices the rows are divided; a divisor of `batch`. Each group then sums its
            gradient of the head by itself, and these are added once. None suits one device; on several, the rows stay
            where they are, too, but gradients are added for each chunk.

    Returns:
        The loss, 0 if no label counts, and sums for metrics.
    """
    after = ((0, 0), (0, 1))
    # The last position stays, with nothing to predict: there is one at least.
    targets = jnp.pad(labels[:, 1:], after, constant_values=IGNORED_LABEL).astype(jnp.int32)
    counts = targets != IGNORED_LABEL
    factors = counts.astype(jnp.float32)
    if weights is not None:
        factors = jnp.where(counts, jnp.pad(jax.lax.stop_gradient(weights)[:, 1:].astype(jnp.float32), after), 0)
    targets = jnp.where(counts, targets, 0)  # In a vocabulary of 99 words, -100 would be no place of any.
    count = factors.sum()
    total = count if num_items_in_batch is None else jnp.asarray(num_items_in_batch, jnp.float32)
    scale = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))

    groups = math.gcd(jax.device_count(), len(labels)) if shards is None else shards
    states = hidden_states.reshape(groups, -1, hidden_states.shape[2])
    targets, factors = targets.reshape(groups, -1), factors.reshape(groups, -1)
    positions = targets.shape[1]
    room = _room(head.shape[vocabulary_axis]) // _LOGITS
    chunk = min(positions, max(1, room // (groups if shards is None else 1)))
    # What counts comes first in each group; chunks after that are not computed.
    order = jnp.argsort(factors == 0, axis=1, stable=True)
    chunks = -(-(factors != 0).sum(axis=1).max() // chunk)
    places = jnp.pad(order, ((0, 0), (0, -positions % chunk)))
    factors = jnp.where(jnp.arange(places.shape[1])[None] < positions, _taken(factors, places), 0)
    static = _Static(options, chunk, vocabulary_axis, shards is not None)
    data = _Data(_taken(targets, places), factors * scale, chunks)
    loss, surprisal, correct = _sums(static, _taken(states, places), head, data)
    return LossOutput(loss, surprisal * total, correct * total, count)


def counted_labels(labels: jax.Array, attention_mask: jax.Array | None, past: Length = 0) -> jax.Array:
    """See `xglm_core.loss.counted_labels`.

    Differs: behind the new positions, which begin at `past`, the mask may go on to all that a cache has room for.
    """
    labels = jnp.asarray(labels, jnp.int32)  # Which a label of 8 bits without a sign needs to become -100.
    if attention_mask is None:
        return labels
    is_token = jax.lax.dynamic_slice_in_dim(attention_mask, past, labels.shape[1], axis=1).astype(bool)
    return jnp.where(jnp.pad(is_token[:, :-1], ((0, 0), (1, 0)), constant_values=True), labels, IGNORED_LABEL)


def _room(vocab_size: int) -> int:
    return chunk_positions(vocab_size, accelerator=not _on_cpu())


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _taken(arrays: jax.Array, places: jax.Array) -> jax.Array:
    """[groups, positions, ...] at other places [groups, any] of each group."""
    return jax.vmap(lambda array, indices: array[indices])(arrays, places)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sums(static: _Static, states: jax.Array, head: jax.Array, data: _Data) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over positions of states [groups, positions, d_model]: losses, surprisals, and how many are correct."""
    return _in_chunks(static, states, head, data, of_states=False, of_head=False)[0]


@functools.partial(_sums.defjvp, symbolic_zeros=True)
def _sums_and_tangents(static: _Static, primals: Any, tangents: Any) -> tuple[Any, Any]:
    wanted = [not isinstance(tangent, SymbolicZero) for tangent in tangents[:2]]
    sums, *gradients = _in_chunks(static, *primals, of_states=wanted[0], of_head=wanted[1])
    slope = nothing = jnp.zeros_like(sums[0])
    for gradient, tangent in zip(gradients, tangents, strict=False):
        if gradient is not None:
            slope = slope + jnp.sum(gradient * tangent.astype(jnp.float32))
    return sums, (slope, nothing, nothing)


def _in_chunks(
    static: _Static, states: jax.Array, head: jax.Array, data: _Data, *, of_states: bool, of_head: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array | None, jax.Array | None]:
    """The sums of `_sums`, and the gradients of the first of them, in the types of states and head, or None."""
    options, size, axis, _ = static
    matrix = head.astype(states.dtype)
    vocabulary, letters = head.shape[axis], ("vd", "dv")[axis]
    of_others = options.label_smoothing / vocabulary
    # float16 has no room for the gradients of single logits, which are divided by the number of targets: later, then.
    unit = jnp.abs(data.factors).max().clip(1e-30) if states.dtype == jnp.float16 else 1

    def step(index: jax.Array, state: Any) -> Any:
        sums, states_gradient, head_gradient = state
        parts = (jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1) for array in (states, *data[:2]))
        # Flat, as XLA would transpose what has more than two axes.
        chunk, targets, factors = (array.reshape(-1, *array.shape[2:]) for array in parts)
        # The vocabulary comes first, for which none of the three products needs a transposed copy.
        logits = _product(f"{letters},nd->vn", matrix, chunk)
        largest = logits.max(axis=0)
        total = largest + jnp.log(jnp.exp(logits - largest[None]).sum(axis=0))
        of_target = jnp.take_along_axis(logits, targets[None], axis=0)[0]
        surprisal = total - of_target
        losses = surprisal + options.z_loss * total**2
        if options.label_smoothing:
            losses = losses + options.label_smoothing * of_target - of_others * logits.sum(axis=0)
        correct = (of_target == largest).astype(jnp.float32)
        sums += (jnp.stack([losses, surprisal, correct]) * factors[None]).sum(axis=1)
        if of_states or of_head:
            is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) == targets[None]
            slopes = jnp.exp(logits - total[None]) * (1 + 2 * options.z_loss * total)[None]
            slopes = slopes - jnp.where(is_target, 1 - options.label_smoothing + of_others, of_others)
            slopes = computed((slopes * (factors / unit)[None]).astype(states.dtype))
        if of_states:
            new = _product(f"vn,{letters}->nd", slopes, matrix).reshape(len(states), size, -1)
            states_gradient = jax.lax.dynamic_update_slice_in_dim(states_gradient, new, index * size, axis=1)
        if of_head:
            head_gradient = _added(static, head_gradient, slopes, chunk)
        return sums, states_gradient, head_gradient

    shape = (len(states), *head.shape) if static.sharded else head.shape
    # Sums differ among devices, which `jax.shard_map` asks for, where anything that is added does.
    zero: Any = sum(jnp.zeros_like(array, jnp.float32, shape=()) for array in (states, head, data.factors))
    start = (
        jnp.broadcast_to(zero, (3,)),
        jnp.broadcast_to(zero, states.shape) if of_states else None,
        jnp.broadcast_to(zero, shape) if of_head else None,
    )
    sums, states_gradient, head_gradient = jax.lax.fori_loop(0, data.chunks, step, start)
    if head_gradient is not None and static.sharded:
        head_gradient = head_gradient.sum(axis=0)
    by_states, by_head = (
        gradient if gradient is None else gradient * unit for gradient in (states_gradient, head_gradient)
    )
    return tuple(sums), by_states, by_head


def _added(static: _Static, gradient: jax.Array, slopes: jax.Array, states: jax.Array) -> jax.Array:
    """The gradient of the head and what a chunk adds to it.

    Args:
        static: see there.
        gradient: as the head, or with a first axis of groups if `static.sharded`; float32.
        slopes: the gradient of the logits [vocab_size, groups * chunk].
        states: [groups * chunk, d_model].
    """
    letters, terms = ("vd", "dv")[static.vocabulary_axis], "n"
    d_model = states.shape[1]
    if static.sharded:
        letters, terms = f"g{letters}", "gn"
        slopes = slopes.reshape(len(slopes), len(gradient), -1)
        states = states.reshape(len(gradient), -1, d_model)
    words = _on_cpu() and jax.device_count() == 1 and not static.sharded
    axis, whole = (letters.index("v"), slopes) if words else (letters.index("d"), states)
    size = whole.shape[0 if words else -1]
    width = min(size, _WORDS if words else max(_COLUMNS, _room(len(slopes)) // (_TERM if _on_cpu() else 1)))

    def step(index: jax.Array, gradient: jax.Array) -> jax.Array:
        # The last part is a full one, too, and has some of the one before, to which it adds nothing.
        begin = jnp.minimum(index * width, size - width)
        part = jax.lax.dynamic_slice_in_dim(whole, begin, width, 0 if words else -1)
        new = begin + jnp.arange(width) >= index * width
        part = jnp.where(jnp.expand_dims(new, (1,) if words else tuple(range(part.ndim - 1))), part, 0)
        factors = (part, states) if words else (slopes, part)
        sums = jax.lax.dynamic_slice_in_dim(gradient, begin, width, axis) + _product(
            f"v{terms},{terms}d->{letters}", *factors
        )
        return jax.lax.dynamic_update_slice_in_dim(gradient, sums, begin, axis)

    return jax.lax.fori_loop(0, -(-size // width), step, gradient)


def _product(formula: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """A float32 sum of products, whatever the type of the factors."""
    return jnp.einsum(formula, first, second, precision=precision(), preferred_element_type=jnp.float32)
