"""The blocks of the decoder, one after the other or as one in a scan.

Differs: a block takes what it needs of a cache and returns what is new, both in forms that `jax.lax.scan` can slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.config import LAYER_NORM_EPS, XGLMConfig
from xglm_core.errors import InputError
from xglm_flax.attention import FlaxXGLMAttention, computed, dense
from xglm_flax.cache import Length, put
from xglm_flax.dropout import FlaxXGLMDropout
from xglm_flax.stacking import by_layer, check_layout, check_stackable, stacked_blocks

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
}


Remat = str | Callable[..., Any]
_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat_policy(remat: Remat) -> Callable[..., Any] | None:
    """What the backward pass finds in memory of each block; the rest of it is computed again.

    Args:
        remat: "none": everything. "dots": the results of the projections and the feed-forward part, but not those of
            attention. "full": the block's input. Or a policy of `jax.checkpoint_policies`, for which the projections'
            results have names: those of their layers, "q_proj" or "fc1".

    Raises:
        InputError: it is something else.
    """
    if remat == "none" or callable(remat):
        return None if isinstance(remat, str) else remat
    if remat not in _POLICIES:
        raise InputError(f"remat is {remat!r}, expected 'none', 'dots', 'full', or a policy of jax.checkpoint_policies")
    return _POLICIES[remat]


class BlockInputs(NamedTuple):
    """What each block gets for itself: an array for one block, or one for each of all blocks; None if there is none.

    Attributes:
        keys, values: those of the positions before, with room for the new ones [batch, heads, capacity, head_dim].
        encoder_keys, encoder_values: those of the encoder, if a cache holds them [batch, heads, encoder length,
            head_dim].
        head_mask, cross_attn_head_mask: factors of its heads' probabilities [heads].
    """

    keys: Any = None
    values: Any = None
    encoder_keys: Any = None
    encoder_values: Any = None
    head_mask: Any = None
    cross_attn_head_mask: Any = None


class BlockResults(NamedTuple):
    """What each block gives besides its states: an array for one block, or one for each of all blocks; or None.

    Attributes:
        keys, values: those that it attended to: `BlockInputs.keys` with the new ones, or these alone.
        encoder_keys, encoder_values: those of the encoder, if they were computed.
        attentions, cross_attentions: the probabilities [batch, heads, length, keys], if asked for.
        hidden_states: the block's input [batch, length, d_model], if asked for.
    """

    keys: Any = None
    values: Any = None
    encoder_keys: Any = None
    encoder_values: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    hidden_states: Any = None


class FlaxXGLMDecoderLayer(nn.Module):
    """One pre-norm block: self-attention, attention to encoder states if there are any, and a feed-forward layer.

    Each is x + f(norm(x)); the last is fc2(activation(fc1(norm(x)))).

    Attributes:
        config: the architecture.
        heads: how many heads its self-attention has.
        dtype: type of the computation.
        param_dtype: type of the parameters.
    """

    config: XGLMConfig
    heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config, types = self.config, (self.dtype, self.param_dtype)
        activation = config.activation_function
        self.self_attn = FlaxXGLMAttention(config, self.heads, *types)
        if config.add_cross_attention:
            self.encoder_attn = FlaxXGLMAttention(config, config.attention_heads, *types)
            self.encoder_attn_layer_norm = layer_norm(*types)
        self.self_attn_layer_norm = layer_norm(*types)
        function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        # The derivative of a GELU is computed again in the backward pass: it has three more arrays of this size. The
        # lambda is for JAX, which would take what it once traced of a function for another model's as well.
        self.activation_fn = jax.checkpoint(lambda states: function(states))
        self.fc1 = dense(config, config.ffn_dim, *types)
        self.fc2 = dense(config, config.d_model, *types)
        self.final_layer_norm = layer_norm(*types)
        self.dropout = FlaxXGLMDropout(config.dropout)
        self.activation_dropout = FlaxXGLMDropout(config.activation_dropout)

    def __call__(
        self,
        hidden_states: jax.Array,
        mask: jax.Array,
        own: BlockInputs,
        *,
        past: Length = 0,
        encoder_hidden_states: jax.Array | None = None,
        encoder_mask: jax.Array | None = None,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[jax.Array, BlockResults]:
        """Runs the block.

        Args:
            hidden_states: [batch, length, d_model].
            mask: see `attention_mask_for`.
            own: what belongs to this block. Differs: a cache is a pure value, so the decoder fills it.
            past: cached positions.
            encoder_hidden_states: [batch, encoder length, d_model], or None.
            encoder_mask: bool [batch, 1, 1, encoder length], True = attend; None = every position.
            output_attentions: whether to return the probabilities of both attentions.
            deterministic: whether dropout is off.

        Returns:
            [batch, length, d_model], and the rest.
        """
        before = residual = hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        key, value = self.self_attn.keys_and_values(hidden_states)
        if own.keys is not None:
            key, value = put(own.keys, key, past), put(own.values, value, past)
        results = BlockResults(key, value)
        hidden_states, attentions = self.self_attn(
            hidden_states,
            key,
            value,
            mask,
            head_mask=own.head_mask,
            output_attentions=output_attentions,
            deterministic=deterministic,
        )
        hidden_states = residual + self.dropout(hidden_states, deterministic)

        cross_attentions = None
        encoder = None if own.encoder_keys is None else (own.encoder_keys, own.encoder_values)
        if encoder is None and encoder_hidden_states is not None:
            encoder = self.encoder_attn.keys_and_values(encoder_hidden_states)
            results = results._replace(encoder_keys=encoder[0], encoder_values=encoder[1])
        if encoder is not None:
            residual = hidden_states
            hidden_states, cross_attentions = self.encoder_attn(
                self.encoder_attn_layer_norm(hidden_states),
                *encoder,
                encoder_mask,
                head_mask=own.cross_attn_head_mask,
                output_attentions=output_attentions,
                deterministic=deterministic,
            )
            hidden_states = residual + self.dropout(hidden_states, deterministic)

        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        hidden_states = self.fc2(self.activation_dropout(hidden_states, deterministic))
        hidden_states = residual + self.dropout(hidden_states, deterministic)
        if not deterministic:
            hidden_states = self._dropped(before, hidden_states)
        return hidden_states, results._replace(attentions=attentions, cross_attentions=cross_attentions)

    def _dropped(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """What follows a block: with probability `config.layerdrop`, what came before it.

        Differs: the block decides, as in a scan each has a key of its own.

        The block runs in any case: so the cache has its keys, each parameter has a gradient, and no shape depends on
        chance.
        """
        if self.config.layerdrop == 0:
            return after
        return jnp.where(jax.random.uniform(self.make_rng("dropout")) < self.config.layerdrop, before, after)


class FlaxXGLMDecoderLayers(nn.Module):
    """The blocks. Differs: Linen would name the items of a list "layers_0"; published trees have layers/0.

    Attributes:
        config: the architecture.
        dtype: type of the computation.
        param_dtype: type of the parameters.
        scan_layers: whether they run as one block in a `jax.lax.scan`, which compiles in the time of one.
        remat: what the backward pass computes again; see `remat_policy`.
    """

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = "none"

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        if self.scan_layers:
            check_stackable(self.config)
        self.blocks = [self._block(index, name=str(index)) for index in range(self.config.num_layers)]

    def __call__(
        self, hidden_states: jax.Array, mask: jax.Array, own: BlockInputs, *, wanted: tuple[str, ...], **shared: Any
    ) -> tuple[jax.Array, BlockResults]:
        """Runs the blocks.

        Args:
            hidden_states: [batch, length, d_model].
            mask: see `attention_mask_for`.
            own: what belongs to each block: in each field one item per block.
            wanted: the fields of the results to keep.
            shared: the other arguments of `FlaxXGLMDecoderLayer.__call__`, the same for all blocks.

        Returns:
            [batch, length, d_model], and what is wanted of each block: in each field one item per block.
        """
        # Parameters come into being where Linen expects them, block by block.
        if self.scan_layers and not self.is_initializing():
            return self._scanned(hidden_states, mask, own, wanted, shared)
        if not self.is_initializing():
            check_layout(self.variables.get("params", {}))

        def run(block: nn.Module, *arguments: Any) -> Any:
            return block(*arguments, **shared)

        if self.remat != "none" and not self.is_initializing():
            run = nn.remat(run, policy=remat_policy(self.remat))
        all_results = []
        for index, block in enumerate(self.blocks):
            before = hidden_states
            one = BlockInputs(*(None if items is None else items[index] for items in own))
            hidden_states, results = run(block, hidden_states, mask, one)
            all_results.append(_wanted(results, before, wanted))
        return hidden_states, jax.tree.map(lambda *leaves: leaves, *all_results)

    def _scanned(
        self, hidden_states: jax.Array, mask: jax.Array, own: BlockInputs, wanted: tuple[str, ...], shared: Any
    ) -> tuple[jax.Array, BlockResults]:
        """The same by `jax.lax.scan`."""
        block = self._block(0, parent=None)
        own = BlockInputs(*(None if items is None else by_layer(items, stacked=True) for items in own))
        past, length = shared["past"], hidden_states.shape[1]
        is_random = not shared["deterministic"] and self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), self.config.num_layers) if is_random else None

        def step(hidden_states: jax.Array, one: tuple[Any, Any, BlockInputs]) -> tuple[jax.Array, BlockResults]:
            params, key, inputs = one
            rngs = {} if key is None else {"dropout": key}
            applied: Any = block.apply({"params": params}, hidden_states, mask, inputs, **shared, rngs=rngs)
            states, results = applied
            if inputs.keys is not None:
                # The others are there already: to stack them again would copy the whole cache for each token.
                new = (jax.lax.dynamic_slice_in_dim(array, past, length, axis=2) for array in results[:2])
                results = BlockResults(*new, *results[2:])
            return states, _wanted(results, hidden_states, wanted)

        if self.remat != "none":
            # A scan is no place where XLA could merge what is computed again with what was computed before.
            step = jax.checkpoint(step, policy=remat_policy(self.remat), prevent_cse=False)
        xs = (stacked_blocks(self.variables["params"]), keys, own)
        hidden_states, results = jax.lax.scan(step, hidden_states, xs)
        if own.keys is not None and results.keys is not None:
            full = (put(own.keys, results.keys, past), put(own.values, results.values, past))
            results = BlockResults(*full, *results[2:])
        return hidden_states, results

    def _block(self, index: int, **options: Any) -> FlaxXGLMDecoderLayer:
        heads = len(self.config.kept_heads(index))
        return FlaxXGLMDecoderLayer(self.config, heads, self.dtype, self.param_dtype, **options)


class FlaxXGLMLayerNorm(nn.LayerNorm):
    """A norm whose input is computed before it.

    Differs: XLA would put all sums that lead to the input into each of its uses, and compile the gradient of 48 blocks
    for minutes. And Flax, too, computes in float32 at least, but leaves the change of type to the promotion of JAX.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> Any:
        """[batch, length, d_model] -> the same."""
        return super().__call__(computed(x).astype(self.dtype), mask=mask).astype(x.dtype)


def layer_norm(dtype: Any, param_dtype: Any) -> FlaxXGLMLayerNorm:
    """The norm of all blocks. Differs: Flax's default variance, E[x^2] - E[x]^2, cancels digits."""
    wide = dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32
    return FlaxXGLMLayerNorm(epsilon=LAYER_NORM_EPS, dtype=wide, param_dtype=param_dtype, use_fast_variance=False)


def _wanted(results: BlockResults, hidden_states: jax.Array, wanted: tuple[str, ...]) -> BlockResults:
    """The wanted fields of a block's results, with its input among them."""
    results = results._replace(hidden_states=hidden_states)
    return BlockResults(**{name: getattr(results, name) for name in wanted})
