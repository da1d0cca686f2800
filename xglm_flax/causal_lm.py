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
from xglm_core.generation.engine import check_not_overridden
from xglm_core.generation.prompts import Prompts
from xglm_core.generation.surface import GenerationSurface
from xglm_core.inputs import inputs_as_given
from xglm_core.loss import LossOptions, LossOutput, wants_logits
from xglm_core.outputs import CausalLMOutputWithCrossAttentions
from xglm_core.resizing import check_embeddings
from xglm_core.weight_names import HEAD
from xglm_flax.attention import FEW_ROWS, dense, few_rows_product, precision
from xglm_flax.blocks import Remat
from xglm_flax.cache import FlaxXGLMCache, as_cache
from xglm_flax.decoder import FlaxXGLMModule
from xglm_flax.generation import FlaxEngine, compile_engine, seed_of
from xglm_flax.inputs import check_head_arguments, is_any_traced
from xglm_flax.loss import causal_lm_loss, counted_labels
from xglm_flax.pretrained import FlaxXGLMPreTrainedModel
from xglm_flax.scoring import FlaxScorer, compile_scorer
from xglm_flax.weights import Params, get_parameter


class FlaxXGLMForCausalLMModule(nn.Module):
    """Decoder and head as a Linen module: what `FlaxXGLMForCausalLM` compiles.

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

    def setup(self) -> None:
        """Creates the layers, under the checkpoint's names."""
        config = self.config
        self.model = FlaxXGLMModule(config, self.dtype, self.param_dtype, self.scan_layers, self.remat)
        if not config.tie_word_embeddings:
            self.lm_head = dense(config, config.vocab_size, self.dtype, self.param_dtype, use_bias=False)

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
        labels: jax.Array | None = None,
        logits_to_keep: int | jax.Array = 0,
        num_items_in_batch: int | jax.Array | None = None,
        return_logits: bool | None = None,
        loss_options: LossOptions = LossOptions(),  # noqa: B008, which is frozen
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Runs the decoder and the head on traced values; see `FlaxXGLMModule` and `FlaxXGLMForCausalLM`."""
        outputs: Any = self.model(
            input_ids,
            attention_mask,
            position_ids,
            encoder_hidden_states,
            encoder_attention_mask,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            deterministic=deterministic,
            past_key_values=past_key_values,
            head_mask=head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            past = 0 if past_key_values is None else past_key_values.length
            labels = counted_labels(labels, attention_mask, past)
            loss = self._loss(hidden_states, labels, num_items_in_batch, options=loss_options).loss
        if wants_logits(
            return_logits, has_labels=labels is not None, training=not deterministic, logits_to_keep=logits_to_keep
        ):
            logits = self._head(_kept(hidden_states, logits_to_keep))
        results = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        return results if (self.config.return_dict if return_dict is None else return_dict) else results.to_tuple()

    def loss(
        self,
        labels: jax.Array,
        num_items_in_batch: jax.Array | None = None,
        *,
        options: LossOptions,
        weights: jax.Array | None = None,
        shards: int | None = None,
        **arguments: Any,
    ) -> LossOutput:
        """The loss alone, of a call with these arguments; see `causal_lm_loss`."""
        outputs: Any = self.model(**arguments, use_cache=False, return_dict=True)
        labels = counted_labels(labels, arguments.get("attention_mask"))
        return self._loss(
            outputs.last_hidden_state, labels, num_items_in_batch, options=options, weights=weights, shards=shards
        )

    def decode(self, input_ids: jax.Array, attention_mask: jax.Array) -> Any:
        """The decoder's output alone."""
        return self.model(input_ids, attention_mask, use_cache=False, return_dict=True)

    def logits_of(self, states: jax.Array, begin: jax.Array, count: int) -> jax.Array:
        """[positions, d_model] -> logits [positions, count] of `count` ids from `begin` on."""
        matrix, axis = self._matrix()
        part = jax.lax.dynamic_slice_in_dim(matrix, begin, count, axis).astype(self.dtype)
        return jnp.einsum("ld,vd->lv" if axis == 0 else "ld,dv->lv", states, part, precision=precision())

    def _matrix(self) -> tuple[jax.Array, int]:
        """The head, and which of its axes is the vocabulary's."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.embedding, 0
        return self.lm_head.variables["params"]["kernel"], 1

    def _loss(self, hidden_states: jax.Array, *arguments: Any, **options: Any) -> LossOutput:
        if not self.config.tie_word_embeddings and self.is_initializing():
            self.lm_head(hidden_states[:, :1])  # Which makes the parameter.
        matrix, axis = self._matrix()
        return causal_lm_loss(hidden_states, matrix, *arguments, **options, vocabulary_axis=axis)

    def _head(self, hidden_states: jax.Array) -> jax.Array:
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden_states)
        # Differs: a tied head is no parameter, so there is nothing to tie again. `nn.Embed.attend` has no precision.
        embedding = self.model.embed_tokens.embedding.astype(self.dtype)
        rows = hidden_states.shape[0] * hidden_states.shape[1]
        if isinstance(rows, int) and 1 < rows <= FEW_ROWS:  # `jax.export` may leave sizes open.
            return few_rows_product(hidden_states, embedding)
        return jnp.einsum("bld,vd->blv", hidden_states, embedding, precision=precision())


class FlaxXGLMForCausalLM(GenerationSurface, FlaxXGLMPreTrainedModel):
    """Decoder and head: logits of the next token. The head is the embedding matrix if `config.tie_word_embeddings`.

    See `FlaxXGLMPreTrainedModel` for the arguments. It may be called inside `jax.jit`, `jax.grad` and `jax.vmap`; what
    is traced there has no values to check.

    Attributes:
        loss_options: label smoothing and z-loss, read at each call.
    """

    has_head = True
    own_arguments = ("params", "prng_key")
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
            return_logits: whether to return logits; None means unless there are labels and `train`, as the loss does
                without, and unless `logits_to_keep` asks for some.

        Returns:
            The output, or the tuple of its results that are not None: logits are [batch, kept positions, vocab_size] in
            the type of the computation, the loss is a float32 scalar.

        Raises:
            InputError: see `FlaxXGLMModel.__call__`; or labels outside the vocabulary.
        """
        check_head_arguments(self.config, input_ids if inputs_embeds is None else inputs_embeds, labels, logits_to_keep)
        return self._call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            train=train,
            params=params,
            past_key_values=past_key_values,
            dropout_rng=dropout_rng,
            head_mask=head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            **_traced_or_static(
                logits_to_keep,
                return_logits=wants_logits(
                    return_logits, has_labels=labels is not None, training=train, logits_to_keep=logits_to_keep
                ),
                loss_options=self.loss_options,
            ),
        )

    def prepare_inputs_for_generation(
        self, input_ids: jax.Array, max_length: int, attention_mask: jax.Array | None = None
    ) -> dict[str, Any]:
        """The arguments, besides the tokens, of the first call of a decoding loop, whose shapes never change.

        Differs: compiled loops carry a cache of fixed capacity, and a mask for all of it.

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

    @inputs_as_given()
    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        params: Params | None = None,
        prng_key: jax.Array | None = None,
        **arguments: Any,
    ) -> Any:
        """Continues each row; see `GenerationSurface.generate`.

        Args:
            input_ids, attention_mask, generation_config, arguments: see there.
            params: the parameters; None means the model's.
            prng_key: a key of JAX, to sample by in place of `seed`. Differs: PyTorch and Keras hold the state of their
                generators; JAX has none.
        """
        return super().generate(
            input_ids, attention_mask, generation_config, params=params, prng_key=prng_key, **arguments
        )

    @inputs_as_given()
    def score(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        return_likeliest: bool = False,
        params: Params | None = None,
    ) -> Any:
        """The log-probability of each token; see `GenerationSurface.score`. Without `params`, the model's are used."""
        return super().score(input_ids, attention_mask, return_likeliest=return_likeliest, params=params)

    def _engine(
        self, past: FlaxXGLMCache | None, prompts: Prompts, options: dict[str, Any], *, params: Any = None, **own: Any
    ) -> FlaxEngine:
        """See `GenerationSurface._engine`."""
        loop = "prepare_inputs_for_generation", "update_inputs_for_generation"
        check_not_overridden(self, FlaxXGLMForCausalLM, *loop)
        return FlaxEngine(self.compiled_engine, self._params_or_own(params), past)

    def _scorer(self, params: Params | None = None) -> FlaxScorer:
        return FlaxScorer(self.compiled_scorer, self._params_or_own(params))

    def _as_cache(self, past_key_values: Any) -> FlaxXGLMCache | None:
        return as_cache(past_key_values, self.config, self.dtype)

    def _to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def _from_numpy(self, array: np.ndarray, like: Any) -> jax.Array:
        # In 32 bits unless JAX is told to have more.
        return jnp.asarray(array.astype(jax.dtypes.canonicalize_dtype(array.dtype)))

    def _is_traced(self, *values: Any) -> bool:
        return is_any_traced(*values)

    def _seeded(
        self, generation: GenerationConfig, options: dict[str, Any], *, prng_key: Any = None, **own: Any
    ) -> GenerationConfig:
        """The options, with the seed that a key of JAX stands for."""
        if prng_key is None:
            return generation
        return dataclasses.replace(generation, seed=seed_of(prng_key, generation, options))

    def _make_module(self) -> None:
        super()._make_module()
        self.compiled_engine = compile_engine(self.module)
        self.compiled_scorer = compile_scorer(self.module)


def _kept(states: jax.Array, logits_to_keep: int | jax.Array) -> jax.Array:
    """The positions of [batch, length, width] that `logits_to_keep` asks for."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]
    return jnp.take(states, logits_to_keep, axis=1)


def _traced_or_static(logits_to_keep: int | jax.Array, **static: Any) -> dict[str, Any]:
    """A count is part of what is compiled, as is the rest; positions are not."""
    if isinstance(logits_to_keep, int):
        return {"static": {**static, "logits_to_keep": logits_to_keep}}
    return {"static": static, "logits_to_keep": logits_to_keep}
