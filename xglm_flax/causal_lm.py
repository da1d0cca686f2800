"""The causal language model: the decoder and its head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.loop import generate
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_flax.attention import PRECISION, dense
from xglm_flax.cache import FlaxXGLMCache
from xglm_flax.decoder import FlaxXGLMModule
from xglm_flax.generation import FlaxEngine, compile_engine
from xglm_flax.inputs import prepared_inputs
from xglm_flax.pretrained import FlaxXGLMPreTrainedModel
from xglm_flax.weights import Params


class FlaxXGLMForCausalLMModule(nn.Module):
    """Decoder and head as a Linen module: what `FlaxXGLMForCausalLM` compiles.

    Attributes:
        config: the architecture.
        dtype: type of the computation.
        param_dtype: type of the parameters.
    """

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        self.model = FlaxXGLMModule(config, self.dtype, self.param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = dense(config, config.vocab_size, self.dtype, self.param_dtype, use_bias=False)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: FlaxXGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        deterministic: bool = True,
    ) -> CausalLMOutputWithCrossAttentions:
        """Runs the decoder and the head on traced values; see `FlaxXGLMModule.__call__`."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states, deterministic
        )
        return CausalLMOutputWithCrossAttentions(
            logits=self._head(outputs.last_hidden_state[:, -logits_to_keep:]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _head(self, hidden_states: jax.Array) -> jax.Array:
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden_states)
        # Differs: a tied head is no parameter, so there is nothing to tie again. `nn.Embed.attend` has no precision.
        embedding = self.model.embed_tokens.embedding.astype(self.dtype)
        return jnp.einsum("bld,vd->blv", hidden_states, embedding, precision=PRECISION)


class FlaxXGLMForCausalLM(FlaxXGLMPreTrainedModel):
    """Decoder and head: logits of the next token. The head is the embedding matrix if `config.tie_word_embeddings`.

    See `FlaxXGLMPreTrainedModel` for the arguments. It may be called inside `jax.jit`, `jax.grad` and `jax.vmap`; what
    is traced there has no values to check.
    """

    has_head = True
    module_class = FlaxXGLMForCausalLMModule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._engine = compile_engine(self.module)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        past_key_values: FlaxXGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
    ) -> CausalLMOutputWithCrossAttentions:
        """Runs the decoder and the head.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states, params,
                dropout_rng, train: see `FlaxXGLMModel.__call__`.
            logits_to_keep: only this many last positions reach the head; 0 means all of them.

        Returns:
            The output; logits are [batch, kept positions, vocab_size] in the type of the computation.

        Raises:
            InputError: see `FlaxXGLMModel.__call__`.
        """
        return self._apply(
            self._params_or_own(params),
            *prepared_inputs(self.config, input_ids, attention_mask, position_ids, past_key_values),
            dropout_rng=dropout_rng,
            train=train,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )

    def generate(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        max_new_tokens: int = 20,
        stop_at_eos: bool = True,
        params: Params | None = None,
    ) -> jax.Array:
        """Continues each row with the likeliest tokens.

        Args:
            input_ids: prompts, integers [rows, length], padded on either side.
            attention_mask: 1 for tokens, 0 for padding [rows, length]; None means no padding.
            max_new_tokens: most tokens to add.
            stop_at_eos: whether a row ends at `config.eos_token_id`.
            params: the parameters; None means the model's.

        Returns:
            Integers [rows, length + new]: `input_ids` as given, then the new tokens; rows that ended are filled with
            padding. Differs: int32, as JAX has no int64 unless it is asked to.

        Raises:
            InputError: there are no parameters, or see `xglm_core.generation.loop.generate`.
        """
        tokens = generate(
            FlaxEngine(self._engine, self._params_or_own(params)),
            np.asarray(input_ids),
            None if attention_mask is None else np.asarray(attention_mask),
            self.config,
            GenerationConfig.from_model(self.config, max_new_tokens=max_new_tokens, stop_at_eos=stop_at_eos),
        )
        return jnp.asarray(tokens)


jax.tree_util.register_dataclass(
    CausalLMOutputWithCrossAttentions,
    data_fields=[field.name for field in dataclasses.fields(CausalLMOutputWithCrossAttentions)],
    meta_fields=[],
)
