"""The causal language model: the decoder and its head."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.loop import generate
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_tf.cache import TFXGLMCache
from xglm_tf.decoder import TFXGLMMainLayer
from xglm_tf.generation import CompiledEngine, TFEngine, compile_engine
from xglm_tf.pretrained import TFXGLMPreTrainedModel


class TFXGLMForCausalLM(TFXGLMPreTrainedModel):
    """Decoder and head: logits of the next token. The head is the embedding matrix if `config.tie_word_embeddings`.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.
        dtype: type of parameters and computation, by name or as a Keras policy.
        plan: the checkpoint to take the weights from instead.
    """

    has_head = True

    def __init__(self, config: XGLMConfig, *, dtype: Any = "float32", plan: LoadPlan | None = None) -> None:
        super().__init__(config, dtype=dtype)
        self.model = TFXGLMMainLayer(config, dtype=self.dtype_policy, name="model")
        # Differs: no layer if tied, because a Keras layer cannot use another's matrix transposed.
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = keras.layers.Dense(
                config.vocab_size, use_bias=False, dtype=self.dtype_policy, name="lm_head"
            )
        self.create_weights(plan)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        self.model.build()
        if self.lm_head is not None:
            self.lm_head.build((None, None, self.config.d_model))

    def call(
        self,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        *,
        past_key_values: TFXGLMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        training: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithCrossAttentions:
        """Runs the decoder and the head.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states, training: see
                `TFXGLMModel.call`.
            logits_to_keep: only this many last positions reach the head; 0 means all of them.

        Returns:
            The output; logits are [batch, kept positions, vocab_size] in the type of the computation.

        Raises:
            InputError: see `TFXGLMModel.call`.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        return CausalLMOutputWithCrossAttentions(
            logits=self._logits(outputs.last_hidden_state[:, -logits_to_keep:]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _logits(self, hidden_states: tf.Tensor) -> tf.Tensor:
        """[batch, length, d_model] -> [batch, length, vocab_size]."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        batch, length, d_model = keras.ops.shape(hidden_states)
        # As one matrix product: for a batch of them, TensorFlow would repeat the table.
        rows = tf.reshape(hidden_states, (batch * length, d_model))
        logits = tf.matmul(rows, self.model.embed_tokens.embeddings, transpose_b=True)
        return tf.reshape(logits, (batch, length, self.config.vocab_size))

    @functools.cached_property
    def compiled_engine(self) -> CompiledEngine:
        """The compiled functions of `generate`; kept, so that each shape is compiled once."""
        return compile_engine(self)

    def generate(
        self,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        stop_at_eos: bool = True,
    ) -> tf.Tensor:
        """Continues each row with the likeliest tokens.

        Args:
            input_ids: prompts, integers [rows, length], padded on either side.
            attention_mask: 1 for tokens, 0 for padding [rows, length]; None means no padding.
            max_new_tokens: most tokens to add.
            stop_at_eos: whether a row ends at `config.eos_token_id`.

        Returns:
            int64 [rows, length + new]: `input_ids` as given, then the new tokens; rows that ended are filled with
            padding.

        Raises:
            InputError: see `xglm_core.generation.loop.generate`.
        """
        tokens = generate(
            TFEngine(self.compiled_engine),
            np.asarray(input_ids),
            None if attention_mask is None else np.asarray(attention_mask),
            self.config,
            GenerationConfig.from_model(self.config, max_new_tokens=max_new_tokens, stop_at_eos=stop_at_eos),
        )
        return tf.constant(tokens)
