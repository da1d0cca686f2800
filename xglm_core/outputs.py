"""The outputs of a model call: the same classes and fields in all backends.

An output is a named tuple of the results that are not None. Every framework flattens and rebuilds named tuples by
itself: `jax.tree`, `tf.function`, Keras `predict`, PyTorch's `DataParallel`, `torch.compile`.
"""

from __future__ import annotations

import itertools
from collections import namedtuple
from typing import Any, ClassVar, Self


class ModelOutput(tuple[Any, ...]):
    """Results by attribute (None if absent), by name, by index, and by unpacking.

    The class that is called lists the possible fields. The object belongs to a subclass that is a named tuple of the
    present fields.
    """

    names: ClassVar[tuple[str, ...]]
    _fields: ClassVar[tuple[str, ...]]
    _named_tuples: ClassVar[dict[tuple[str, ...], Any]]  # By the present fields.
    __slots__ = ()

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "_fields"):
            # All are made in advance: `torch.compile` cannot return an instance of a class that is made while it
            # traces.
            cls._named_tuples = {
                present: type(cls.__name__, (cls, namedtuple(cls.__name__, present)), {"__slots__": ()})
                for count in range(len(cls.names) + 1)
                for present in itertools.combinations(cls.names, count)
            }

    def __new__(cls, *values: Any, **results: Any) -> Self:
        """Makes an output of the given results; None counts as absent."""
        if values:  # Frameworks rebuild a named tuple in this way.
            return tuple.__new__(cls, values)
        for name in results:
            if name not in cls.names:
                raise TypeError(f"{cls.__name__} has no field {name!r}; expected some of {cls.names}")
        present = tuple(name for name in cls.names if results.get(name) is not None)
        output: Self = tuple.__new__(cls._named_tuples[present], [results[name] for name in present])
        return output

    def to_tuple(self) -> tuple[Any, ...]:
        """The results that are not None, as a plain tuple."""
        return tuple(self)

    def keys(self) -> tuple[str, ...]:
        """The names of the results that are not None."""
        return self._fields

    def values(self) -> tuple[Any, ...]:
        """The results that are not None."""
        return tuple(self)

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Names and results that are not None."""
        return tuple(zip(self._fields, self, strict=True))

    def get(self, name: str, default: Any = None) -> Any:
        """The result of this name, or the default if it is absent."""
        return getattr(self, name) if name in self._fields else default

    def __getattr__(self, name: str) -> Any:
        if name in self.names:
            return None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; its fields are {', '.join(self.names)}")

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self._fields:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._fields  # Without comparing arrays.

    def __setattr__(self, name: str, value: Any) -> None:
        # `output.loss += more` changes the tensor in place, and then assigns that same tensor.
        if name not in self._fields or getattr(self, name) is not value:
            raise AttributeError(
                f"{name} of a {type(self).__name__} cannot be assigned, as outputs are tuples; make another one: "
                f"{type(self).__name__}(**{{**outputs, {name!r}: value}})"
            )

    def __setitem__(self, name: Any, value: Any) -> None:
        setattr(self, name if isinstance(name, str) else self._fields[name], value)

    # Outputs are equal only if they are identical: a comparison of arrays has no single answer.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self).__bases__[0], dict(self.items()))


class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """Result of the decoder.

    Attributes:
        last_hidden_state: [batch, length, d_model], after the final norm.
        past_key_values: the cache, if requested.
        hidden_states: num_layers + 1 arrays [batch, length, d_model], if requested: the input of each block, then
            `last_hidden_state`.
        attentions: num_layers arrays [batch, heads, length, keys], if requested: the attention probabilities of each
            position over the cached and the new ones, after the head mask.
        cross_attentions: the same over the encoder's positions, if there are any.
    """

    names = ("last_hidden_state", "past_key_values", "hidden_states", "attentions", "cross_attentions")
    __slots__ = ()


class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Result of the causal language model.

    Attributes:
        loss: the mean over the labels that count, a float32 scalar; only with labels.
        logits: [batch, kept positions, vocab_size].
        past_key_values, hidden_states, attentions, cross_attentions: as in
            `BaseModelOutputWithPastAndCrossAttentions`.
    """

    names = ("loss", "logits", "past_key_values", "hidden_states", "attentions", "cross_attentions")
    __slots__ = ()


class GenerateOutput(ModelOutput):
    """Result of `generate` with `return_dict_in_generate=True`.

    Attributes:
        sequences: ids [rows, prompt + new]; the `num_return_sequences` rows of a prompt follow each other.
        sequences_scores: for beam search: the log-probability of each row's new tokens, divided by their number to the
            power `length_penalty` [rows].
        scores: if requested, the scores of each step, with penalties and bans: log-probabilities for beam search, else
            logits; a tuple of float32 [rows or beams, vocab_size].
        logits: if requested, the model's logits of each step, in the same form.
        beam_indices: for beam search: the beam, counted over all prompts, that each new token continued [rows, new];
            -1 after the end.
        past_key_values: the cache of all columns but the last; positions after the end of a row are padding. None for
            beam search, or if `use_cache` is False.
    """

    names = ("sequences", "sequences_scores", "scores", "logits", "beam_indices", "past_key_values")
    __slots__ = ()


def _unpickled(cls: type[ModelOutput], results: dict[str, Any]) -> ModelOutput:
    return cls(**results)
