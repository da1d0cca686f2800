"""How users of Linen call the modules: `module.apply({"params": params}, input_ids, attention_mask)`.

Differs: in PyTorch and Keras the model is the module. Here the model classes check first, and then call `results`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.calls import DecoderInputs, Wanted, present, resolve
from xglm_core.config import XGLMConfig
from xglm_core.outputs import ModelOutput
from xglm_flax.cache import FlaxXGLMCache
from xglm_flax.remat import Remat


class FlaxXGLMLinenModule(nn.Module):
    """The base of the Linen modules.

    Attributes:
        config: the architecture.
        dtype: type of the computation.
        param_dtype: type of the parameters.
        scan_layers: whether the blocks run in a `jax.lax.scan`; then the parameters may be those of `stack_layers`.
        remat: what the backward pass computes again; see `remat_policy`.
    """

    config: XGLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = "none"

    output_class: ClassVar[type[ModelOutput]]

    def results(
        self, inputs: DecoderInputs, cache: FlaxXGLMCache | None, wanted: Wanted, *, deterministic: bool = True
    ) -> dict[str, Any]:
        """What a call returns, by the names of the output: that of the bare decoder."""
        results: dict[str, Any] = self.decode(inputs, cache, wanted, deterministic=deterministic)._asdict()
        return results

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        encoder_attention_mask: jax.Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
        past_key_values: FlaxXGLMCache | None = None,
        *,
        head_mask: jax.Array | None = None,
        cross_attn_head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        use_cache: bool | None = None,
        **of_head: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Runs the module; nothing is checked, and a cache has to have room.

        Args:
            input_ids, position_ids, encoder_hidden_states, encoder_attention_mask, output_attentions,
                output_hidden_states, return_dict, head_mask, cross_attn_head_mask, inputs_embeds, use_cache: see
                `FlaxXGLMModel.__call__`.
            attention_mask: as there, or for all positions that `past_key_values` has room for.
            deterministic: whether dropout is off.
            past_key_values: the cache of an earlier call.
            of_head: with a head, `labels`, `num_items_in_batch`, `logits_to_keep` and `return_logits` of
                `FlaxXGLMForCausalLM.__call__`, and `loss_options`.
        """
        encoder, masks = (encoder_hidden_states, encoder_attention_mask), (head_mask, cross_attn_head_mask)
        inputs = DecoderInputs(input_ids, attention_mask, position_ids, *encoder, *masks, inputs_embeds)
        wanted = resolve(self.config, use_cache, output_attentions, output_hidden_states)
        results = self.results(inputs, past_key_values, wanted, deterministic=deterministic, **of_head)
        return present(self.output_class, self.config, return_dict, **results)
