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
from xglm_flax.cache import Length
from xglm_flax.fast.barriers import barrier
from xglm_flax.layers import precision

_PLAIN = LossOptions()
# XLA computes a term of a sum before it adds it. So logits take half of the room that there is for them, and what a
# chunk adds to the gradient of the head is computed in parts. One CPU takes some tokens at a time, which lie together.
# Where several devices may divide the vocabulary, each takes some columns: a quarter of the room, but at least 32, as
# fewer would be slow. Accelerators have room for all columns, and would take three times as long for some.
_LOGITS, _TERM, _COLUMNS, _WORDS = 2, 4, 32, 1024


class _Static(NamedTuple):
    """What is part of the program: the options, positions of a chunk in each group, and see `causal_lm_loss`."""

    options: LossOptions
    chunk: int
    vocabulary_axis: int
    sharded: bool


class _Data(NamedTuple):
    """What has no gradients: targets int32 and their weights float32 [groups, positions], and how many chunks count."""

    targets: jax.Array
    loss_weights: jax.Array
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

    Differs: PyTorch and Keras define a backward pass, and this a rule for both modes of differentiation. The gradients
    are computed with the loss, if wanted; its tangent is their product with the tangents of states and head.

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
    loss_weights = counts.astype(jnp.float32)
    if weights is not None:
        weights = jnp.pad(jax.lax.stop_gradient(weights)[:, 1:].astype(jnp.float32), after)
        loss_weights = jnp.where(counts, weights, 0)
    targets = jnp.where(counts, targets, 0)  # In a vocabulary of 99 tokens, -100 would not be a place of any.
    count = loss_weights.sum()
    total = count if num_items_in_batch is None else jnp.asarray(num_items_in_batch, jnp.float32)
    scale = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))

    rows = labels.shape[0]  # Which `jax.export` may leave open.
    groups = shards or (math.gcd(jax.device_count(), rows) if isinstance(rows, int) else 1)
    states = hidden_states.reshape(groups, -1, hidden_states.shape[2])
    targets, loss_weights = targets.reshape(groups, -1), loss_weights.reshape(groups, -1)
    positions = targets.shape[1]
    room = max(1, _room(head.shape[vocabulary_axis]) // _LOGITS // (groups if shards is None else 1))
    chunk = min(positions, room) if isinstance(positions, int) else room
    padding = -positions % chunk if isinstance(positions, int) else chunk
    # What counts comes first in each group; chunks after that are not computed.
    order = jnp.argsort(loss_weights == 0, axis=1, stable=True)
    chunks = -(-(loss_weights != 0).sum(axis=1).max() // chunk)
    places = jnp.pad(order, ((0, 0), (0, padding)))
    loss_weights = jnp.where(jnp.arange(places.shape[1])[None] < positions, _taken(loss_weights, places), 0)
    static = _Static(options, chunk, vocabulary_axis, shards is not None)
    data = _Data(_taken(targets, places), loss_weights * scale, chunks)
    loss, surprisal, correct = _sums(static, _taken(states, places), head, data)
    return LossOutput(loss, surprisal * total, correct * total, count)


def counted_labels(labels: jax.Array, attention_mask: jax.Array | None, past: Length = 0) -> jax.Array:
    """See `xglm_core.loss.counted_labels`.

    Differs: in PyTorch and Keras the mask ends with the new positions. Here they begin at `past`, and the mask may
    cover all that a cache has room for.
    """
    labels = jnp.asarray(labels, jnp.int32)  # Unsigned integers of 8 bits cannot become -100.
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
    return _in_chunks(static, states, head, data)[0]


@functools.partial(_sums.defjvp, symbolic_zeros=True)
def _sums_and_tangents(static: _Static, primals: Any, tangents: Any) -> tuple[Any, Any]:
    wanted = [not isinstance(tangent, SymbolicZero) for tangent in tangents[:2]]
    sums, *gradients = _in_chunks(static, *primals, with_grad_states=wanted[0], with_grad_head=wanted[1])
    tangent_of_loss = nothing = jnp.zeros_like(sums[0])
    for gradient, tangent in zip(gradients, tangents, strict=False):
        if gradient is not None:
            tangent_of_loss = tangent_of_loss + jnp.sum(gradient * tangent.astype(jnp.float32))
    return sums, (tangent_of_loss, nothing, nothing)


def _in_chunks(
    static: _Static,
    states: jax.Array,
    head: jax.Array,
    data: _Data,
    *,
    with_grad_states: bool = False,
    with_grad_head: bool = False,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array | None, jax.Array | None]:
    """The sums of `_sums`, and the gradients of the first of them by states and head, float32, or None."""
    options, size, axis, _ = static
    matrix = head.astype(states.dtype)
    letters = ("vd", "dv")[axis]
    # float16 has no room for the gradients of single logits, which are divided by the number of targets: later, then.
    unit = jnp.abs(data.loss_weights).max().clip(1e-30) if states.dtype == jnp.float16 else 1

    def step(index: jax.Array, state: Any) -> Any:
        sums, grad_states, grad_head = state
        parts = (jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1) for array in (states, *data[:2]))
        # Flat, as XLA would transpose what has more than two axes.
        chunk, targets, loss_weights = (array.reshape(-1, *array.shape[2:]) for array in parts)
        # The vocabulary comes first, for which none of the three products needs a transposed copy.
        logits = _product(f"{letters},nd->vn", matrix, chunk)
        per_position, log_sum_exp = _of_positions(options, logits, targets)
        sums += (per_position * loss_weights[None]).sum(axis=1)
        if with_grad_states or with_grad_head:
            grad_logits = _grad_logits(options, logits, targets, log_sum_exp) * (loss_weights / unit)[None]
            grad_logits = barrier(grad_logits.astype(states.dtype))
        if with_grad_states:
            new = _product(f"vn,{letters}->nd", grad_logits, matrix).reshape(len(states), size, -1)
            grad_states = jax.lax.dynamic_update_slice_in_dim(grad_states, new, index * size, axis=1)
        if with_grad_head:
            grad_head = _added(static, grad_head, grad_logits, chunk)
        return sums, grad_states, grad_head

    shape = (len(states), *head.shape) if static.sharded else head.shape
    # Sums differ among devices, which `jax.shard_map` asks for, where anything that is added does.
    zero: Any = sum(jnp.zeros_like(array, jnp.float32, shape=()) for array in (states, head, data.loss_weights))
    start = (
        jnp.broadcast_to(zero, (3,)),
        jnp.broadcast_to(zero, states.shape) if with_grad_states else None,
        jnp.broadcast_to(zero, shape) if with_grad_head else None,
    )
    sums, grad_states, grad_head = jax.lax.fori_loop(0, data.chunks, step, start)
    if grad_head is not None and static.sharded:
        grad_head = grad_head.sum(axis=0)
    grad_states, grad_head = (None if array is None else array * unit for array in (grad_states, grad_head))
    return tuple(sums), grad_states, grad_head


def _of_positions(options: LossOptions, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of logits [vocab_size, positions]: loss, surprisal and whether it is correct [3, positions], and log sum exp."""
    max_logit = logits.max(axis=0)
    log_sum_exp = max_logit + jnp.log(jnp.exp(logits - max_logit[None]).sum(axis=0))
    of_target = jnp.take_along_axis(logits, targets[None], axis=0)[0]
    surprisal = log_sum_exp - of_target
    losses = surprisal + options.z_loss * log_sum_exp**2
    if options.label_smoothing:
        losses = losses + options.label_smoothing * (of_target - logits.sum(axis=0) / len(logits))
    return jnp.stack([losses, surprisal, (of_target == max_logit).astype(jnp.float32)]), log_sum_exp


def _grad_logits(options: LossOptions, logits: jax.Array, targets: jax.Array, log_sum_exp: jax.Array) -> jax.Array:
    """The gradients of the losses of `_of_positions` by the logits."""
    of_others = options.label_smoothing / len(logits)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) == targets[None]
    gradients = jnp.exp(logits - log_sum_exp[None]) * (1 + 2 * options.z_loss * log_sum_exp)[None]
    return gradients - jnp.where(is_target, 1 - options.label_smoothing + of_others, of_others)


def _added(static: _Static, grad_head: jax.Array, grad_logits: jax.Array, states: jax.Array) -> jax.Array:
    """The gradient of the head, and what a chunk adds to it, part by part.

    Args:
        static: see there.
        grad_head: as the head, or with a first axis of groups if `static.sharded`; float32.
        grad_logits: [vocab_size, groups * chunk].
        states: [groups * chunk, d_model].
    """
    letters, terms = ("vd", "dv")[static.vocabulary_axis], "n"
    if static.sharded:
        letters, terms = f"g{letters}", "gn"
        groups, d_model = len(grad_head), states.shape[1]
        grad_logits, states = grad_logits.reshape(len(grad_logits), groups, -1), states.reshape(groups, -1, d_model)
    by_tokens = _on_cpu() and jax.device_count() == 1 and not static.sharded
    axis, whole = (letters.index("v"), grad_logits) if by_tokens else (letters.index("d"), states)
    size = whole.shape[0 if by_tokens else -1]
    columns = max(_COLUMNS, _room(len(grad_logits)) // (_TERM if _on_cpu() else 1))
    width = min(size, _WORDS if by_tokens else columns)

    def step(index: jax.Array, grad_head: jax.Array) -> jax.Array:
        # The last part is a full one, too, and has some of the one before, to which it adds nothing.
        begin = jnp.minimum(index * width, size - width)
        part = jax.lax.dynamic_slice_in_dim(whole, begin, width, 0 if by_tokens else -1)
        new = begin + jnp.arange(width) >= index * width
        part = jnp.where(jnp.expand_dims(new, (1,) if by_tokens else tuple(range(part.ndim - 1))), part, 0)
        factors = (part, states) if by_tokens else (grad_logits, part)
        added = _product(f"v{terms},{terms}d->{letters}", *factors)
        added = jax.lax.dynamic_slice_in_dim(grad_head, begin, width, axis) + added
        return jax.lax.dynamic_update_slice_in_dim(grad_head, added, begin, axis)

    return jax.lax.fori_loop(0, -(-size // width), step, grad_head)


def _product(formula: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """A float32 sum of products, whatever the type of the factors."""
    return jnp.einsum(formula, first, second, precision=precision(), preferred_element_type=jnp.float32)
