"""The inputs and results of a decoder. Nothing is checked inside it.

A public call checks its arguments, resolves defaults, decodes, applies head or loss, and presents the results.
Generation, scoring and training call `decode(inputs, cache, wanted)` directly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.outputs import ModelOutput


class DecoderInputs(NamedTuple):
    """The inputs of a decoder: tensors of the framework, with the shapes of the public call.

    Attributes:
        input_ids: new tokens, integers [batch, length]; None if there are embeddings.
        attention_mask: 1 for tokens, 0 for padding, for cached and new positions; None means no (further) padding.
        position_ids: integers [batch or 1, length]; None counts the tokens of each row, without padding.
        encoder_hidden_states: [batch, encoder length, d_model]; None if there are none, or if the cache holds them.
        encoder_attention_mask: 1 for encoder positions, 0 for padding [batch, encoder length]; None means no padding.
        head_mask, cross_attn_head_mask: factors of the attention probabilities [num_layers, attention_heads], or None.
        inputs_embeds: scaled embeddings [batch, length, d_model] in place of `input_ids`.
    """

    input_ids: Any = None
    attention_mask: Any = None
    position_ids: Any = None
    encoder_hidden_states: Any = None
    encoder_attention_mask: Any = None
    head_mask: Any = None
    cross_attn_head_mask: Any = None
    inputs_embeds: Any = None


class Wanted(NamedTuple):
    """The results that a decoder returns besides the last hidden state; fixed before compilation.

    Attributes:
        cache: whether to return a cache. A given cache is extended in any case.
        attentions: whether to return the attention probabilities.
        hidden_states: whether to return the input of each block, and the last hidden state.
    """

    cache: bool = False
    attentions: bool = False
    hidden_states: bool = False


class DecoderResults(NamedTuple):
    """The results of a decoder, by the names of the public output; None for those that were not wanted.

    Attributes:
        last_hidden_state: [batch, length, d_model], after the final norm.
        past_key_values: the cache.
        hidden_states: the input of each block, then the last hidden state.
        attentions, cross_attentions: the probabilities of each block.
    """

    last_hidden_state: Any
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    cross_attentions: tuple[Any, ...] | None = None


def resolve(
    config: XGLMConfig,
    use_cache: bool | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    *,
    uncached: str = "",
) -> Wanted:
    """Resolves what a call wants; None follows the configuration.

    Args:
        config: the configuration, with the defaults.
        use_cache, output_attentions, output_hidden_states: the arguments of the call.
        uncached: what keeps no cache, if this model cannot; the default is then no cache.

    Raises:
        InputError: the call wants a cache, but the model cannot keep one.
    """
    if uncached and use_cache:
        raise InputError(f"use_cache is True, but {uncached} keeps no cache; expected False or None")
    return Wanted(
        cache=bool(config.use_cache and not uncached if use_cache is None else use_cache),
        attentions=bool(config.output_attentions if output_attentions is None else output_attentions),
        hidden_states=bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
    )


def present(
    kind: type[ModelOutput], config: XGLMConfig, return_dict: bool | None, **results: Any
) -> ModelOutput | tuple[Any, ...]:
    """Makes an output of the results that are not None, or a plain tuple; None follows the configuration."""
    outputs = kind(**results)
    return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()
