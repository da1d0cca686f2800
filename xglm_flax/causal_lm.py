"""The causal language model: the decoder and its head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xglm_core.calls import DecoderInputs, Wanted, present, resolve
from xglm_core.config import XGLMConfig
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import check_not_overridden
from xglm_core.generation.prompts import Prompts
from xglm_core.inputs import inputs_as_given
from xglm_core.loss import LossOptions, LossOutput, wants_logits
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_core.resizing import check_embeddings
from xglm_core.scoring.engine import CompiledScorer
from xglm_core.weight_names import HEAD
from xglm_flax.cache import FlaxXGLMCache, as_cache
from xglm_flax.decoder import FlaxXGLMModule
from xglm_flax.generation import FlaxEngine, compile_engine
from xglm_flax.inputs import check_head_arguments
from xglm_flax.layers import dense, precision
from xglm_flax.linen import FlaxXGLMLinenModule
from xglm_flax.loss import causal_lm_loss, counted_labels
from xglm_flax.pretrained import FlaxXGLMPreTrainedModel
from xglm_flax.scoring import compile_scorer
from xglm_flax.surface import FlaxGenerationSurface
from xglm_flax.weights import Params, get_parameter


class FlaxXGLMForCausalLMModule(FlaxXGLMLinenModule):
    """Decoder and head as a Linen module: what `FlaxXGLMForCausalLM` compiles. See `FlaxXGLMLinenModule`.

    Differs: in PyTorch and TF the model class is the module itself.
    """

    output_class = CausalLMOutputWithCrossAttentions

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        self.model = FlaxXGLMModule(config, self.dtype, self.param_dtype, self.scan_layers, self.remat)
        if not config.tie_word_embeddings:
            self.lm_head = dense(config, config.vocab_size, self.dtype, self.param_dtype, use_bias=False)

    def head(self, states: jax.Array) -> jax.Array:
        """[batch, length, d_model] -> logits [batch, length, vocab_size]."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(states)
        # Differs: PyTorch and Keras have a head in any case; here a tied one is no parameter.
        matrix = self.model.embed_tokens.embedding.astype(self.dtype)
        return jnp.einsum("bld,vd->blv", states, matrix, precision=precision())

    def loss(self, states: jax.Array, labels: jax.Array, *arguments: Any, **options: Any) -> LossOutput:
        """See `causal_lm_loss`."""
        matrix, axis = self.matrix()
        return causal_lm_loss(states, matrix, labels, *arguments, **options, vocabulary_axis=axis)

    def matrix(self) -> tuple[jax.Array, int]:
        """The head's matrix, and which of its axes is the vocabulary's."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.embedding, 0
        return self.lm_head.variables["params"]["kernel"], 1

    def results(
        self,
        inputs: DecoderInputs,
        cache: FlaxXGLMCache | None,
        wanted: Wanted,
        *,
        deterministic: bool = True,
        labels: jax.Array | None = None,
        num_items_in_batch: int | jax.Array | None = None,
        logits_to_keep: int | jax.Array = 0,
        return_logits: bool | None = None,
        loss_options: LossOptions = LossOptions(),  # noqa: B008, which is frozen
    ) -> dict[str, Any]:
        """Loss and logits, and what `decode` returns, by the names of the output; see `FlaxXGLMForCausalLM`."""
        results = self.model.results(inputs, cache, wanted, deterministic=deterministic)
        states = results.pop("last_hidden_state")
        has_labels, training = labels is not None, not deterministic
        is_wanted = wants_logits(return_logits, has_labels=has_labels, training=training, logits_to_keep=logits_to_keep)
        if is_wanted or self.is_initializing():
            results["logits"] = self.head(_kept(states, logits_to_keep))
        if labels is not None:
            labels = counted_labels(labels, inputs.attention_mask, 0 if cache is None else cache.length)
            results["loss"] = self.loss(states, labels, num_items_in_batch, options=loss_options).loss
        return results


class FlaxXGLMForCausalLM(FlaxGenerationSurface, FlaxXGLMPreTrainedModel):
    """Decoder and head: logits of the next token. The head is the embedding matrix if `config.tie_word_embeddings`.

    See `FlaxXGLMPreTrainedModel` for the arguments. It may be called inside `jax.jit`, `jax.grad` and `jax.vmap`; what
    is traced there has no values to check.

    Attributes:
        loss_options: label smoothing and z-loss, read at each call.
    """

    has_head = True
    module_class = FlaxXGLMForCausalLMModule

    def __init__(self, config: XGLMConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.generation_config = GenerationConfig.from_model(config)
        self.loss_options = LossOptions()

    @inputs_as_given()
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
        train: bool = False,
        params: Params | None = None,
        past_key_values: Any = None,
        dropout_rng: jax.Array | None = None,
        *,
        head_mask: jax.Array | None = None,
        cross_attn_head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        use_cache: bool | None = None,
        labels: jax.Array | None = None,
        logits_to_keep: int | jax.Array = 0,
        num_items_in_batch: int | jax.Array | None = None,
        return_logits: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Runs the decoder and the head.

        Args:
            input_ids, attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask, output_attentions,
                output_hidden_states, return_dict, train, params, past_key_values, dropout_rng, head_mask,
                cross_attn_head_mask, inputs_embeds, use_cache: see `FlaxXGLMModel.__call__`.
            labels: the tokens to predict, integers [batch, length], not shifted; -100 does not count, nor what padding
                would have to predict. `labels=input_ids` trains on all tokens of rows without padding.
            logits_to_keep: only this many last positions reach the head, or those in this vector of positions; 0 means
                all of them. With labels, the loss is that of all positions.
            num_items_in_batch: what to divide the loss by, for batches in several parts; None counts the labels.
            return_logits: whether to compute and return logits; None means no in training with labels, as the loss does
                not need them, unless `logits_to_keep` names some.

        Returns:
            The output, or the tuple of its results that are not None: logits are [batch, kept positions, vocab_size] in
            the type of the computation, the loss is a float32 scalar.

        Raises:
            InputError: see `FlaxXGLMModel.__call__`; or labels outside the vocabulary.
        """
        encoder, masks = (encoder_hidden_states, encoder_attention_mask), (head_mask, cross_attn_head_mask)
        inputs = DecoderInputs(input_ids, attention_mask, position_ids, *encoder, *masks, inputs_embeds)
        check_head_arguments(self.config, inputs, labels, logits_to_keep)
        params, inputs, cache, key = self._checked_call(inputs, past_key_values, params, train, dropout_rng)
        wanted = resolve(self.config, use_cache, output_attentions, output_hidden_states)
        items = None if num_items_in_batch is None else jnp.asarray(num_items_in_batch)
        of_head: dict[str, Any] = {"labels": labels, "num_items_in_batch": items, "loss_options": self.loss_options}
        of_head |= {"logits_to_keep": logits_to_keep, "return_logits": return_logits, "deterministic": not train}
        results = self._results(params, inputs, cache, key, wanted=wanted, **of_head)
        return present(CausalLMOutputWithCrossAttentions, self.config, return_dict, **results)

    def prepare_inputs_for_generation(
        self, input_ids: jax.Array, max_length: int, attention_mask: jax.Array | None = None
    ) -> dict[str, Any]:
        """The arguments, besides the tokens, of the first call of a decoding loop, whose shapes never change.

        Differs: PyTorch and Keras ask for this at each step. Here compiled loops carry a cache of fixed capacity, and a
        mask for all of it.

        Args:
            input_ids: prompts [rows, length].
            max_length: positions to make room for.
            attention_mask: 1 for tokens, 0 for padding [rows, length]; None means no padding.
        """
        rows, length = input_ids.shape
        prompt = (
            jnp.ones((rows, length), jnp.int32) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        )
        return {
            "past_key_values": self.init_cache(rows, max_length),
            "attention_mask": jnp.pad(prompt, ((0, 0), (0, max_length - length)), constant_values=1),
            "position_ids": jnp.maximum(jnp.cumsum(prompt, axis=1) - 1, 0),
        }

    def update_inputs_for_generation(self, model_outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments, besides the token, of the next call, which reads one token.

        Args:
            model_outputs: what the call before returned.
            model_kwargs: its arguments, from here or from `prepare_inputs_for_generation`.
        """
        return {
            **model_kwargs,
            "past_key_values": model_outputs.past_key_values,
            "position_ids": model_kwargs["position_ids"][:, -1:] + 1,
        }

    def get_output_embeddings(self) -> jax.Array:
        """The head [vocab_size, d_model]: the token embedding if it is tied, else the transpose of the parameter."""
        if self.config.tie_word_embeddings:
            return self.get_input_embeddings()
        return get_parameter(self._params_or_own(None), self._specs()[HEAD]).T

    def set_output_embeddings(self, new_embeddings: jax.Array) -> None:
        """Replaces the head [vocab_size, d_model].

        If it is not this model's embedding matrix, the two are not tied any more, and `config.tie_word_embeddings` is
        False.

        Raises:
            InputError: it has another shape, or there are no parameters.
        """
        check_embeddings(np.shape(new_embeddings), self.config)
        self.config.tie_word_embeddings = new_embeddings is self.get_input_embeddings()
        self.tie_weights()
        if not self.config.tie_word_embeddings:
            self._set_matrix(HEAD, new_embeddings)

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter again, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            params = {name: tree for name, tree in self._params_or_own(None).items() if name != "lm_head"}
            self._make_module()
            self.params = params
        else:
            self._make_module()

    def _engine(
        self, past: FlaxXGLMCache | None, prompts: Prompts, options: dict[str, Any], *, params: Any = None, **own: Any
    ) -> FlaxEngine:
        """See `GenerationSurface._engine`."""
        loop = "prepare_inputs_for_generation", "update_inputs_for_generation"
        check_not_overridden(self, FlaxXGLMForCausalLM, *loop)
        return FlaxEngine(self.compiled_engine, self._params_or_own(params), past)

    def _scorer(self, **own: Any) -> CompiledScorer:
        return CompiledScorer(self.compiled_scorer, self._params_or_own(own.get("params")))

    def _as_cache(self, past_key_values: Any) -> FlaxXGLMCache | None:
        return as_cache(past_key_values, self.config, self.dtype)

    def _make_module(self) -> None:
        super()._make_module()
        self.compiled_engine = compile_engine(self.module)
        self.compiled_scorer = compile_scorer(self.module)


def _kept(states: jax.Array, logits_to_keep: int | jax.Array) -> jax.Array:
    """The positions of [batch, length, width] that `logits_to_keep` asks for."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]
    return jnp.take(states, logits_to_keep, axis=1)
