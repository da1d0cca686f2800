"""The blocks of the decoder, one after the other or as one in a scan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.config import XGLMConfig
from xglm_flax.attention import FlaxXGLMAttention
from xglm_flax.cache import KeyValue, Length, write
from xglm_flax.layers import FlaxXGLMLayerNorm, dense
from xglm_flax.remat import Remat, remat_policy
from xglm_flax.stacking import check_layout, check_stackable, stacked, stacked_blocks, unstacked

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
}


class BlockInputs(NamedTuple):
    """What all blocks of a call read besides the states.

    Differs: the blocks of PyTorch and TF read `DecoderInputs`. Here they may be one scan, with other inputs for each.

    Attributes:
        mask: see `attention_mask_for`.
        start: cached positions.
        encoder_hidden_states: [batch, encoder length, d_model], or None.
        encoder_mask: bool [batch, 1, 1, encoder length], True = attend; None = every position.
        deterministic: whether dropout is off.
    """

    mask: jax.Array
    start: Length
    encoder_hidden_states: jax.Array | None
    encoder_mask: jax.Array | None
    deterministic: bool


class OwnInputs(NamedTuple):
    """What one block reads of its own.

    Differs: in PyTorch and Keras a block finds this by its index, but the blocks of a scan share one module.

    Attributes:
        cached: keys and values of the positions before, with room for the new ones [batch, heads, capacity, head_dim];
            None if there is no cache.
        encoder: keys and values of the encoder, if the cache has them.
        head_mask, cross_attn_head_mask: factors of its heads' probabilities [heads], or None.
    """

    cached: KeyValue | None
    encoder: KeyValue | None
    head_mask: jax.Array | None
    cross_attn_head_mask: jax.Array | None


class BlockResults(NamedTuple):
    """What one block returns besides the states; None where there is nothing, or nothing was wanted.

    Differs: PyTorch and TF return plain tuples; a scan of blocks needs one structure for all.

    Attributes:
        cached: `OwnInputs.cached` with the new keys and values; without it, these alone.
        encoder: keys and values of the encoder.
        attentions, cross_attentions: the probabilities [batch, heads, length, keys].
        hidden_states: the block's input [batch, length, d_model].
    """

    cached: KeyValue | None = None
    encoder: KeyValue | None = None
    attentions: jax.Array | None = None
    cross_attentions: jax.Array | None = None
    hidden_states: jax.Array | None = None

    def only(self, names: tuple[str, ...]) -> BlockResults:
        """Those of these names."""
        return BlockResults(**{name: getattr(self, name) for name in names})


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
            self.encoder_attn_layer_norm = FlaxXGLMLayerNorm(*types)
        self.self_attn_layer_norm = FlaxXGLMLayerNorm(*types)
        function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        # The backward pass computes a GELU again, which would keep three more arrays of this size. The lambda is for
        # JAX, which would reuse the trace of one function in other models.
        self.activation_fn = jax.checkpoint(lambda states: function(states))
        self.fc1 = dense(config, config.ffn_dim, *types)
        self.fc2 = dense(config, config.d_model, *types)
        self.final_layer_norm = FlaxXGLMLayerNorm(*types)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def __call__(self, states: jax.Array, own: OwnInputs, inputs: BlockInputs) -> tuple[jax.Array, BlockResults]:
        """Runs the block on states [batch, length, d_model]; returns the next states, and all results."""
        before, encoder, deterministic = states, own.encoder, inputs.deterministic
        normed = self.self_attn_layer_norm(states)
        key, value = self.self_attn.keys_and_values(normed)
        if own.cached is not None:
            key, value = write(own.cached[0], key, inputs.start), write(own.cached[1], value, inputs.start)
        attended, attentions = self.self_attn(normed, key, value, inputs.mask, own.head_mask, deterministic)
        states = states + self.dropout(attended, deterministic)

        cross_attentions = None
        if encoder is None and inputs.encoder_hidden_states is not None:
            encoder = self.encoder_attn.keys_and_values(inputs.encoder_hidden_states)
        if encoder is not None:
            normed = self.encoder_attn_layer_norm(states)
            attended, cross_attentions = self.encoder_attn(
                normed, *encoder, inputs.encoder_mask, own.cross_attn_head_mask, deterministic
            )
            states = states + self.dropout(attended, deterministic)

        inner = self.activation_dropout(self.activation_fn(self.fc1(self.final_layer_norm(states))), deterministic)
        states = states + self.dropout(self.fc2(inner), deterministic)
        if self.config.layerdrop and not deterministic:
            # The block runs in any case, so that the cache has its keys and each parameter has a gradient. Differs: in
            # PyTorch and Keras the decoder decides; here each block of a scan has its own key.
            states = jnp.where(jax.random.uniform(self.make_rng("dropout")) < self.config.layerdrop, before, states)
        return states, BlockResults((key, value), encoder, attentions, cross_attentions, before)


class FlaxXGLMDecoderLayers(nn.Module):
    """The blocks. Differs: PyTorch and Keras have a list; Linen would call its items "layers_0", not layers/0.

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
        self, states: jax.Array, own: list[OwnInputs], inputs: BlockInputs, wanted: tuple[str, ...]
    ) -> tuple[jax.Array, list[BlockResults]]:
        """Runs the blocks.

        Args:
            states: [batch, length, d_model].
            own: of each block.
            inputs: of all blocks.
            wanted: which results to keep.

        Returns:
            [batch, length, d_model], and the results of each block.
        """

        def run(block: nn.Module, states: jax.Array, one: OwnInputs) -> Any:
            states, results = block(states, one, inputs)
            return states, results.only(wanted)

        if not self.is_initializing():  # Parameters come into being block by block.
            if self.scan_layers:
                return self._scanned(states, own, inputs, wanted)
            check_layout(self.variables.get("params", {}))
            if self.remat != "none":
                run = nn.remat(run, policy=remat_policy(self.remat))
        all_results = []
        for block, one in zip(self.blocks, own, strict=True):
            states, results = run(block, states, one)
            all_results.append(results)
        return states, all_results

    def _scanned(
        self, states: jax.Array, own: list[OwnInputs], inputs: BlockInputs, wanted: tuple[str, ...]
    ) -> tuple[jax.Array, list[BlockResults]]:
        """The same by `jax.lax.scan`."""
        block, count, length = self._block(0, parent=None), len(own), states.shape[1]
        is_random = not inputs.deterministic and self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), count) if is_random else None

        def step(states: jax.Array, of_block: tuple[Any, Any, OwnInputs]) -> tuple[jax.Array, BlockResults]:
            params, key, one = of_block
            rngs = {} if key is None else {"dropout": key}
            found: Any = block.apply({"params": params}, states, one, inputs, rngs=rngs)
            states, results = found
            if one.cached is not None:  # Only what is new: to stack the rest would copy it.
                new = (jax.lax.dynamic_slice_in_dim(array, inputs.start, length, axis=2) for array in results.cached)
                results = results._replace(cached=tuple(new))
            return states, results.only(wanted)

        if self.remat != "none":
            # `prevent_cse` is for code outside of scans, where XLA could merge both computations.
            step = jax.checkpoint(step, policy=remat_policy(self.remat), prevent_cse=False)
        states, results = jax.lax.scan(step, states, (stacked_blocks(self.variables["params"]), keys, stacked(own)))
        all_results = unstacked(results, count)
        for index, one in enumerate(own):
            if one.cached is not None and results.cached is not None:
                pairs = zip(one.cached, all_results[index].cached, strict=True)
                cached = tuple(write(old, new, inputs.start) for old, new in pairs)
                all_results[index] = all_results[index]._replace(cached=cached)
        return states, all_results

    def _block(self, index: int, **options: Any) -> FlaxXGLMDecoderLayer:
        heads = len(self.config.kept_heads(index))
        return FlaxXGLMDecoderLayer(self.config, heads, self.dtype, self.param_dtype, **options)
