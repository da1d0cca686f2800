"""The decoder: embeddings, positions, blocks, final norm."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from xglm_core.calls import DecoderInputs, DecoderResults, Wanted, present, resolve
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.config import XGLMConfig
from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions
from xglm_core.positions import POSITION_OFFSET, position_table
from xglm_tf.attention import attention_mask_for
from xglm_tf.blocks import TFXGLMDecoderLayer, layer_norm
from xglm_tf.cache import TFXGLMCache, as_cache, extend_cache
from xglm_tf.inputs import check_arguments
from xglm_tf.keras_steps import NamedArguments
from xglm_tf.pretrained import TFXGLMPreTrainedModel


class TFXGLMSinusoidalPositionalEmbedding(keras.layers.Layer):
    """Looks up rows of the position table, which is always computed and always float32."""

    def __init__(self, config: XGLMConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        table = position_table(config)
        # Differs: one row more than in PyTorch, of NaN, for positions past the limit: compiled code cannot raise. And
        # another name than `weights`, by which Keras means something else.
        self.table = tf.constant(np.concatenate([table, np.full_like(table[:1], np.nan)]))

    def build(self, input_shape: Any = None) -> None:
        """Creates nothing: there are no variables."""

    def call(self, position_ids: tf.Tensor) -> tf.Tensor:
        """float32 [batch, length, d_model] for positions [batch, length]; NaN past the limit."""
        return tf.gather(self.table, tf.minimum(position_ids + POSITION_OFFSET, len(self.table) - 1))


class TFXGLMScaledWordEmbedding(keras.layers.Embedding):
    """Token embeddings times `embed_scale`: what `inputs_embeds` stands in for.

    Attributes:
        embed_scale: the factor.
    """

    def __init__(self, config: XGLMConfig, **kwargs: Any) -> None:
        super().__init__(config.vocab_size, config.d_model, **kwargs)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[batch, length, d_model] for ids [batch, length]."""
        return self.scaled(super().call(inputs))

    def scaled(self, rows: tf.Tensor) -> tf.Tensor:
        """Rows of the matrix times `embed_scale`."""
        # In float32: in bfloat16 the scale itself would be rounded, by up to 0.2%.
        return tf.cast(tf.cast(rows, tf.float32) * self.embed_scale, self.compute_dtype)


class TFXGLMDecoderCall(NamedArguments):
    """The call of the bare decoder, as a layer and as a model. Differs: in PyTorch `XGLMModel` is both.

    It has two doors: the public one, and for `DecoderInputs`, a cache and `Wanted` that of `decode`, past all checks.
    """

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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """Runs the decoder.

        Arguments are given by position, by name, or all in the first one: as a mapping by name, or as a list or tuple
        in this order.

        Args:
            input_ids: new tokens, integers [batch, length].
            attention_mask: 1 for tokens, 0 for padding [batch, past + length]; None means no (further) padding.
            position_ids: positions of the new tokens, integers [batch or 1, length]; None counts the tokens of each row
                that are not padding.
            encoder_hidden_states: what cross-attention attends to [batch, encoder length, d_model]; the cache keeps
                what it needs of them, and later calls need not give them again.
            encoder_attention_mask: 1 for encoder positions, 0 for padding [batch, encoder length]; None means no
                padding, or what the cache remembers.
            head_mask: factors of the attention probabilities [num_layers, attention_heads]: 0 switches a head off.
            cross_attn_head_mask: the same for cross-attention.
            past_key_values: the cache of an earlier call, or a tuple with (key, value) of each layer, each [batch,
                heads, past, head_dim], and then, if any, those of the encoder; it stays valid and unchanged. A pair
                may be one tensor [2, batch, heads, past, head_dim].
            inputs_embeds: embeddings instead of `input_ids` [batch, length, d_model], as `get_input_embeddings()` gives
                them: scaled, without positions.
            use_cache: whether to return a cache; None follows the configuration.
            output_attentions: whether to return attention probabilities; None follows the configuration. Inside a
                `tf.function` those after a cache are over all keys that it has room for, 0 where nothing is held.
            output_hidden_states: whether to return the input of each block and the final states; None follows the
                configuration.
            return_dict: whether to return an output object rather than a tuple; None follows the configuration.
            training: whether dropout acts.

        Returns:
            The output, its states in the type of the computation, or the tuple of its results that are not None.

        Raises:
            InputError: arguments are missing, unknown or contradict each other, have another shape, hold ids outside
                the vocabulary or a position past the limit. Inside a `tf.function` no values are checked: the result is
                NaN if a position is past the limit or the cache, which cannot grow there, is full.
        """
        if type(input_ids) is DecoderInputs:
            return self.decode(input_ids, attention_mask, position_ids, training=training)
        masks = encoder_attention_mask, head_mask, cross_attn_head_mask
        inputs = DecoderInputs(input_ids, attention_mask, position_ids, encoder_hidden_states, *masks, inputs_embeds)
        cache = as_cache(past_key_values, self.config)
        check_arguments(self.config, inputs, cache)
        wanted = resolve(self.config, use_cache, output_attentions, output_hidden_states)
        results = self.decode(inputs, cache, wanted, training=training)
        return present(BaseModelOutputWithPastAndCrossAttentions, self.config, return_dict, **results._asdict())


class TFXGLMMainLayer(TFXGLMDecoderCall):
    """The decoder as a layer.

    Differs: in PyTorch `XGLMModel` is all of this. `layers` means something else in a Keras model, and a model and its
    parts need one set of variable paths.
    """

    def __init__(self, config: XGLMConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self._allow_non_tensor_positional_args = True  # Keras' word for `Wanted`.
        self.config = config
        self.embed_tokens = TFXGLMScaledWordEmbedding(config, dtype=dtype, name="embed_tokens")
        self.embed_positions = TFXGLMSinusoidalPositionalEmbedding(config, dtype="float32", name="embed_positions")
        self.dropout = keras.layers.Dropout(config.dropout, dtype=dtype)
        self.layers = [TFXGLMDecoderLayer(config, index, dtype=dtype) for index in range(config.num_layers)]
        self.layer_norm = layer_norm("layer_norm", dtype)
        self.seed_generator = keras.random.SeedGenerator()

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables, in the order of the weights in a checkpoint."""
        for layer in self._flatten_layers(include_self=False, recursive=False):
            layer.build((None, None) if layer is self.embed_tokens else (None, None, self.config.d_model))

    def decode(
        self, inputs: DecoderInputs, cache: TFXGLMCache | None, wanted: Wanted, *, training: bool = False
    ) -> DecoderResults:
        """The inner door: embeds, adds positions, runs the blocks, norms. Nothing is checked.

        It is called through this layer's own call, `layer(inputs, cache, wanted)`.

        Args:
            inputs: what to read; with a cache that holds some, the mask may have columns up to its capacity.
            cache: what was read before, or None; it stays valid and unchanged.
            wanted: what to return besides the last states.
            training: whether dropout acts.
        """
        hidden_states = self.embed_tokens(inputs.input_ids) if inputs.inputs_embeds is None else inputs.inputs_embeds
        batch, length, _ = keras.ops.shape(hidden_states)
        past, encoder_mask = tf.constant(0), inputs.encoder_attention_mask
        if cache is not None:
            past, encoder_mask = cache.length, cache.encoder_mask if encoder_mask is None else encoder_mask
        encoder_mask = None if encoder_mask is None else tf.cast(encoder_mask, tf.bool)
        if wanted.cache or cache is not None:
            cache = extend_cache(cache, self.config, batch, length, self.compute_dtype)
            mask = key_mask(inputs.attention_mask, cache.mask, past, length)
            cache = dataclasses.replace(cache, mask=mask, encoder_mask=encoder_mask)
            mask = mask[:, :length] if cache.known_length == 0 else mask
        else:
            mask = key_mask(inputs.attention_mask, tf.zeros((batch, length), tf.bool), past, length)
        position_ids = position_ids_for(mask, past, length) if inputs.position_ids is None else inputs.position_ids
        positions = tf.cast(self.embed_positions(position_ids), self.compute_dtype)
        hidden_states = self.dropout(hidden_states + positions)
        if cache is not None and not tf.executing_eagerly():
            # Compiled code cannot raise, and would overwrite the last positions: NaN is better than wrong.
            hidden_states = tf.where(past + length <= cache.capacity, hidden_states, math.nan)

        inputs = inputs._replace(
            attention_mask=attention_mask_for(mask, past, length),
            encoder_attention_mask=None if encoder_mask is None else encoder_mask[:, None, None, :],
        )
        kept = []
        for index, layer in enumerate(self.layers):
            own = () if cache is None else cache.layers[index]
            after, part, *probabilities = layer(hidden_states, inputs, own, past)
            before = hidden_states if wanted.hidden_states else None
            kept.append((part, before, *(probabilities if wanted.attentions else (None, None))))
            hidden_states = self._dropped(hidden_states, after, training)
        hidden_states = self.layer_norm(hidden_states)
        parts, all_states, attentions, cross_attentions = zip(*kept, strict=True)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=parts, length=past + length)
        if wanted.attentions and tf.executing_eagerly():
            # Without the room that nothing fills yet. Compiled code, whose shapes are fixed, reports it as zeros.
            attentions = tuple(of_layer[..., : past + length] for of_layer in attentions)
        return DecoderResults(
            hidden_states,
            cache if wanted.cache else None,
            (*all_states, hidden_states) if wanted.hidden_states else None,
            attentions if wanted.attentions else None,
            cross_attentions if cross_attentions[0] is not None else None,
        )

    def _dropped(self, before: tf.Tensor, after: tf.Tensor, training: bool) -> tf.Tensor:
        """What follows a block: in training, with probability `config.layerdrop`, what came before it.

        The block runs in any case: so the cache has its keys, each parameter has a gradient, and no graph depends on
        randomness.
        """
        if not training or self.config.layerdrop == 0:
            return after
        return tf.where(keras.random.uniform((), seed=self.seed_generator) < self.config.layerdrop, before, after)


@keras.saving.register_keras_serializable(package="xglm")
class TFXGLMModel(TFXGLMDecoderCall, TFXGLMPreTrainedModel):
    """The bare decoder: token ids to hidden states.

    Args:
        config: the architecture; weights are drawn at random, see `from_pretrained` for trained ones.
        embed_tokens: an embedding [vocab_size, d_model] whose values this model starts with; None draws them.
        dtype: type of parameters and computation, by name or as a Keras policy; None follows Keras' global policy.
        plan: the checkpoint to take the weights from instead.
        kwargs: see `keras.Model`.

    Raises:
        InputError: `embed_tokens` has another shape.
    """

    has_head = False

    def __init__(
        self,
        config: XGLMConfig,
        embed_tokens: Any = None,
        *,
        dtype: Any = None,
        plan: LoadPlan | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, dtype=dtype, **kwargs)
        self.model = TFXGLMMainLayer(config, dtype=self.dtype_policy, name="model")
        self.create_weights(plan)
        if embed_tokens is not None:
            self.set_input_embeddings(embed_tokens)

    def build(self, input_shape: Any = None) -> None:
        """Creates the variables."""
        self.model.build()

    def decode(
        self, inputs: DecoderInputs, cache: TFXGLMCache | None, wanted: Wanted, *, training: bool = False
    ) -> DecoderResults:
        """See `TFXGLMMainLayer.decode`."""
        results: DecoderResults = self.model(inputs, cache, wanted, training=training)
        return results


def key_mask(attention_mask: tf.Tensor | None, held: tf.Tensor, past: tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """Which keys are no padding, among cached and new ones.

    Args:
        attention_mask: that of the call, over cached and new positions; None means no further padding.
        held: bool [batch, capacity], False where nothing is held yet.
        past: cached positions, int32.
        length: new positions.

    Returns:
        bool [batch, capacity].
    """
    capacity = keras.ops.shape(held)[1]
    if attention_mask is not None:
        unused = capacity - keras.ops.shape(attention_mask)[1]
        return tf.pad(tf.cast(attention_mask, tf.bool), ((0, 0), (0, unused)))
    slots = tf.range(capacity)
    return held | ((slots >= past) & (slots < past + length))


def position_ids_for(mask: tf.Tensor, past: tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """Counts each row's tokens that are not padding: [batch, length]; padding repeats the position before it."""
    counts = tf.maximum(tf.cumsum(tf.cast(mask, tf.int32), axis=1) - 1, 0)
    # A slice would do, but XLA would compile it anew for each value of `past`.
    return tf.gather(counts, tf.minimum(past + tf.range(length), keras.ops.shape(mask)[1] - 1), axis=1)
