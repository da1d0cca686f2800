"""The causal language model: the decoder and its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from xglm_core.calls import DecoderInputs, present, resolve
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.config import XGLMConfig
from xglm_core.generation.compiled import Compiled
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import check_not_overridden
from xglm_core.generation.prompts import Prompts
from xglm_core.generation.surface import GenerationSurface
from xglm_core.loss import wants_logits
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_core.scoring.engine import CompiledScorer
from xglm_tf.cache import TFXGLMCache, as_cache
from xglm_tf.decoder import TFXGLMMainLayer
from xglm_tf.fast.few_rows import table_product
from xglm_tf.generation import TFEngine, compile_engine, draw_seed
from xglm_tf.inputs import check_arguments, check_head_arguments, is_traced
from xglm_tf.pretrained import TFXGLMPreTrainedModel, embedding_matrix
from xglm_tf.scoring import compile_scorer
from xglm_tf.tracing import compiled
from xglm_tf.training import Training, decode_with_loss
from xglm_tf.weights import name_scopes, unlocked


class TFXGLMHead(keras.layers.Dense):
    """A head of its own, without bias; zero unless another initializer is set.

    Keras quantizes none but its own classes, so not this one: loss and `score` read the matrix as it is.

    Differs: PyTorch has `nn.Linear` here and Flax `nn.Dense`, as no `model.quantize` replaces them.
    """

    def __init__(self, config: XGLMConfig, dtype: Any) -> None:
        super().__init__(config.vocab_size, use_bias=False, kernel_initializer="zeros", dtype=dtype, name="lm_head")


@keras.saving.register_keras_serializable(package="xglm")
class TFXGLMForCausalLM(GenerationSurface, Training, TFXGLMPreTrainedModel):
    """Decoder and head: logits of the next token. The head is the embedding matrix if `config.tie_word_embeddings`.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.
        dtype: type of parameters and computation, by name or as a Keras policy; None follows Keras' global policy.
        plan: the checkpoint to take the weights from instead.
        kwargs: see `keras.Model`.
    """

    has_head = True

    # Inside of a `tf.function` they raise one line, of which autograph would make a listing of code.
    generate = tf.autograph.experimental.do_not_convert(GenerationSurface.generate)
    score = tf.autograph.experimental.do_not_convert(GenerationSurface.score)
    stream = tf.autograph.experimental.do_not_convert(GenerationSurface.stream)

    def __init__(self, config: XGLMConfig, *, dtype: Any = None, plan: LoadPlan | None = None, **kwargs: Any) -> None:
        # The loss takes the head as it is, in float32 in mixed precision, where Keras would convert it.
        super().__init__(config, dtype=dtype, autocast=False, **kwargs)
        self.generation_config = GenerationConfig.from_model(config)
        self.model = TFXGLMMainLayer(config, dtype=self.dtype_policy, name="model")
        # Differs: None if tied, where PyTorch has a layer that shares the weight: a Keras layer cannot use another's
        # matrix transposed.
        self.lm_head = None if config.tie_word_embeddings else TFXGLMHead(self.config, self.dtype_policy)
        self.create_weights(plan)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        self.model.build()
        if self.lm_head is not None:
            self.lm_head.build((None, None, self.config.d_model))

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        encoder_hidden_states: tf.Tensor | None = None,
        encoder_attention_mask: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        cross_attn_head_mask: tf.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: tf.Tensor | None = None,
        labels: tf.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
        *,
        logits_to_keep: int | tf.Tensor = 0,
        num_items_in_batch: int | tf.Tensor | None = None,
        return_logits: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Runs the decoder and the head.

        Args:
            input_ids, attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask, head_mask,
                cross_attn_head_mask, past_key_values, inputs_embeds, use_cache, output_attentions,
                output_hidden_states, return_dict, training: see `TFXGLMModel.call`.
            labels: the tokens to predict, integers [batch, length], not shifted; -100 does not count, nor what padding
                would have to predict. `labels=input_ids` trains on all tokens of rows without padding.
            logits_to_keep: only this many last positions reach the head, or those in this vector of positions; 0 means
                all of them. With labels, the loss is that of all positions.
            num_items_in_batch: what to divide the loss by, for batches in several parts; None counts the labels.
            return_logits: whether to return logits, which the loss does not need; None means yes, but in training with
                labels only if `logits_to_keep` asks for some.

        Returns:
            The output, or the tuple of its results that are not None: logits are [batch, kept positions, vocab_size] in
            the type of the computation, the loss is a float32 scalar.

        Raises:
            InputError: see `TFXGLMModel.call`; or labels outside the vocabulary.
        """
        masks = encoder_attention_mask, head_mask, cross_attn_head_mask
        inputs = DecoderInputs(input_ids, attention_mask, position_ids, encoder_hidden_states, *masks, inputs_embeds)
        cache = as_cache(past_key_values, self.config)
        check_head_arguments(self.config, inputs, labels, logits_to_keep)
        check_arguments(self.config, inputs, cache)
        wanted = resolve(self.config, use_cache, output_attentions, output_hidden_states)
        decoded, loss = decode_with_loss(self, inputs, cache, wanted, labels, num_items_in_batch, training=training)
        results = decoded._asdict() | {"loss": None if loss is None else loss.loss}
        states = results.pop("last_hidden_state")
        if wants_logits(return_logits, has_labels=labels is not None, training=training, logits_to_keep=logits_to_keep):
            results["logits"] = self.logits(_kept(states, logits_to_keep))
        return present(CausalLMOutputWithCrossAttentions, self.config, return_dict, **results)

    def prepare_inputs_for_generation(
        self,
        input_ids: tf.Tensor,
        past_key_values: Any = None,
        attention_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call of a decoding loop: the tokens that the cache does not hold yet.

        Args:
            input_ids: all tokens so far [rows, length].
            past_key_values: the cache of the earlier ones, or None.
            attention_mask: 1 for tokens, 0 for padding [rows, length], or None.
            inputs_embeds: the prompt's embeddings, which take the place of ids in the first call.
            options: passed on.
        """
        past = as_cache(past_key_values, self.config)
        if past is None and inputs_embeds is not None:
            tokens = {"inputs_embeds": inputs_embeds}
        else:
            tokens = {"input_ids": input_ids if past is None else input_ids[:, past.length :]}
        return {**options, **tokens, "past_key_values": past, "attention_mask": attention_mask}

    def get_output_embeddings(self) -> keras.layers.Layer:
        """The head: a `Dense` layer, or the embedding if it is tied."""
        return self.get_input_embeddings() if self.lm_head is None else self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Takes over the values of a head or an embedding.

        If it is not this model's embedding, the two are not tied any more, and `config.tie_word_embeddings` is False.

        Args:
            new_embeddings: see `set_input_embeddings`.

        Raises:
            InputError: the matrix has another shape.
        """
        matrix = embedding_matrix(new_embeddings, self.config)
        self.config.tie_word_embeddings = new_embeddings is self.get_input_embeddings()
        self.tie_weights()
        if self.config.tie_word_embeddings:
            return
        if self.lm_head is None:
            with unlocked(self), name_scopes(self.path):
                self.lm_head = TFXGLMHead(self.config, self.dtype_policy)
                self.lm_head.build((None, None, self.config.d_model))
            self.forget_compiled()
        self.lm_head.kernel.assign(tf.transpose(matrix))

    def tie_weights(self) -> None:
        """Drops the head, in favour of the embedding, if the configuration ties them."""
        if self.config.tie_word_embeddings and self.lm_head is not None:
            with unlocked(self):
                self._tracker.untrack(self.lm_head)
                del self.lm_head  # TensorFlow forgets what is deleted, not what is replaced.
                self.lm_head = None
            self.forget_compiled()

    def logits(self, hidden_states: tf.Tensor) -> tf.Tensor:
        """The head: [batch, length, d_model] -> [batch, length, vocab_size]."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        # As one matrix product: for a batch of them, TensorFlow would repeat the table.
        rows = tf.reshape(hidden_states, (-1, self.config.d_model))
        logits = table_product(rows, tf.cast(self.model.embed_tokens.embeddings, hidden_states.dtype))
        return tf.reshape(logits, (*keras.ops.shape(hidden_states)[:2], self.config.vocab_size))

    @property
    def compiled_scorer(self) -> Callable[..., Any]:
        """The compiled function of `score`; kept as long as the model stays as it is: each shape is compiled once."""
        return compiled(self, "score", compile_scorer)

    @property
    def compiled_engine(self) -> Compiled:
        """The compiled functions of `generate`, kept as that of `score` is."""
        return compiled(self, "generate", compile_engine)

    def _engine(self, past: Any, prompts: Prompts, options: dict[str, Any], **own: Any) -> TFEngine:
        """See `GenerationSurface._engine`."""
        check_not_overridden(self, TFXGLMForCausalLM, "prepare_inputs_for_generation")
        return TFEngine(self.compiled_engine, past)

    def _scorer(self, **own: Any) -> CompiledScorer:
        return CompiledScorer(self.compiled_scorer)

    def _as_cache(self, past_key_values: Any) -> TFXGLMCache | None:
        return as_cache(past_key_values, self.config)

    def _from_numpy(self, array: np.ndarray, like: Any) -> tf.Tensor:
        return tf.constant(array)

    _is_traced = staticmethod(is_traced)
    _draw_seed = staticmethod(draw_seed)


def _kept(states: tf.Tensor, logits_to_keep: int | tf.Tensor) -> tf.Tensor:
    """The positions of [batch, length, width] that `logits_to_keep` asks for."""
    return states[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else tf.gather(states, logits_to_keep, axis=1)
