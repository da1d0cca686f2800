"""From logits to tokens, on the device: the array operations of `xglm_core.generation.selection`."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from xglm_core.generation.selection import DeviceRules, Selection

jax.tree_util.register_dataclass(
    DeviceRules,
    data_fields=["values"],
    meta_fields=["normalized", "renormalized", "forced", "sample", "width"],
)


class FlaxSelection(Selection):
    """`Selection`. Differs: PyTorch and TF need no class of their own, see `limit`."""

    def limit(self, scores: jax.Array, rules: DeviceRules) -> tuple[jax.Array, jax.Array]:
        """See `Selection.limit`.

        Differs: PyTorch and TF sort scores and ids together. On a CPU, XLA takes 30 times as long to sort pairs as to
        sort integers. So only the scores are sorted here. This tells how many are kept, and the last of them.
        """
        if rules.width < scores.shape[1]:
            return super().limit(scores, rules)
        values = _descending(scores)
        count = self.kept(values, rules).sum(axis=-1, keepdims=True)
        last = jnp.take_along_axis(values, count - 1, axis=1)
        above, level = scores > last, scores == last
        kept = above | (level & (jnp.cumsum(level, axis=-1) <= count - above.sum(axis=-1, keepdims=True)))
        return jnp.where(kept, scores, -jnp.inf), self.iota(scores)


def _descending(scores: jax.Array) -> jax.Array:
    """Scores [rows, any] from the largest to the smallest."""

    def toggled(bits: jax.Array) -> jax.Array:
        """Between the bits of float32 values and integers in the same order."""
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    order = jnp.sort(~toggled(jax.lax.bitcast_convert_type(scores, jnp.int32)), axis=-1)
    return jax.lax.bitcast_convert_type(toggled(~order), jnp.float32)


def _put(array: jax.Array, ids: jax.Array, values: Any) -> jax.Array:
    return array.at[jnp.arange(len(array))[:, None], ids].set(values, mode="drop")


def _max(array: jax.Array) -> jax.Array:
    """XLA's maximum may ignore NaN."""
    broken = jnp.isnan(array).any(axis=-1, keepdims=True)
    return jnp.where(broken, jnp.nan, array.max(axis=-1, keepdims=True))


def _argmax(array: jax.Array) -> jax.Array:
    """The first maximum; on a CPU, `jnp.argmax` takes several times as long."""
    is_largest = array == array.max(axis=-1, keepdims=True)
    return jnp.where(is_largest, _iota(array), array.shape[1]).min(axis=-1)


def _iota(array: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, array.shape, 1)


selection = FlaxSelection(
    float32=lambda array: array.astype(jnp.float32),
    reshape=jnp.reshape,
    broadcast_to=jnp.broadcast_to,
    full_like=jnp.full_like,
    where=jnp.where,
    put=_put,
    take=functools.partial(jnp.take_along_axis, axis=1),
    iota=_iota,
    max=_max,
    argmax=_argmax,
    top=jax.lax.top_k,
    argsort=jnp.argsort,
    isnan=jnp.isnan,
    exp=jnp.exp,
    log=jnp.log,
    log1p=jnp.log1p,
    softmax=jax.nn.softmax,
    log_softmax=jax.nn.log_softmax,
    cumsum=functools.partial(jnp.cumsum, axis=-1),
    sum=functools.partial(jnp.sum, axis=-1, keepdims=True),
    logsumexp=functools.partial(jax.nn.logsumexp, axis=-1, keepdims=True),
    uint32=lambda ids: ids.astype(jnp.uint32),
    low_bits=lambda bits: bits,
    right_shift=operator.rshift,
)
