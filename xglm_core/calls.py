"""What goes into a decoder and comes out of it: the inner door of every backend, behind which nothing is checked.

A public call checks its arguments, resolves what follows the configuration, decodes, applies head or loss, and presents
the results. Generation, scoring and training enter at `decode(inputs, cache, wanted)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.outputs import ModelOutput


class DecoderInputs(NamedTuple):
    """What a decoder reads: tensors of the framework. Shapes are those of the public call.

    Attributes:
        input_ids: new tokens, integers [batch, length]; None if there are embeddings.
        attention_mask: 1 for tokens, 0 for padding, over cached and new positions; None means no (further) padding.
        position_ids: integers [batch or 1, length]; None counts the tokens of each row that are not padding.
        encoder_hidden_states: [batch, encoder length, d_model]; None if there are none, or the cache has read them.
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
    """Which results a decoder is to return besides the last states; known before anything is compiled.

    Attributes:
        cache: the cache. A cache that was given is extended in any case.
        attentions: the attention probabilities.
        hidden_states: the input of each block, and the last states.
    """

    cache: bool = False
    attentions: bool = False
    hidden_states: bool = False


class DecoderResults(NamedTuple):
    """What a decoder returns, by the names of the public output; None where nothing was wanted.

    Attributes:
        last_hidden_state: [batch, length, d_model], after the final norm.
        past_key_values: the cache.
        hidden_states, attentions, cross_attentions: one for each block, in a tuple; and the last states.
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
    """What a call asks for; None follows the configuration.

    Args:
        config: has the defaults.
        use_cache, output_attentions, output_hidden_states: as the caller gave them.
        uncached: why this model keeps no cache, if that is so: the default is then not to.

    Raises:
        InputError: a cache is asked for, and the model keeps none.
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
    """The results that are not None as an output of this kind, or as a plain tuple; None follows the configuration."""
    outputs = kind(**results)
    return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()
