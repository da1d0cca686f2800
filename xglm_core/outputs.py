"""What a model call returns: the same classes and fields in all backends.

An output is a named tuple of those results that are not None. Named tuples are what every framework takes apart and
puts together again by itself: `jax.tree`, `tf.function`, Keras `predict`, PyTorch's `DataParallel`, `torch.compile`.
"""

from __future__ import annotations

import itertools
from collections import namedtuple
from typing import Any, ClassVar, Self


class ModelOutput(tuple[Any, ...]):
    """Results by attribute (None where there is none), by name, by index, and by unpacking.

    The class that is called names the fields; the object that comes out is of a subclass which is a named tuple of the
    fields present.
    """

    names: ClassVar[tuple[str, ...]]
    _fields: ClassVar[tuple[str, ...]]
    _named_tuples: ClassVar[dict[tuple[str, ...], Any]]  # By the fields present.
    __slots__ = ()

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "_fields"):
            # All of them at once: `torch.compile` cannot return what belongs to a class that it met being made.
            cls._named_tuples = {
                present: type(cls.__name__, (cls, namedtuple(cls.__name__, present)), {"__slots__": ()})
                for count in range(len(cls.names) + 1)
                for present in itertools.combinations(cls.names, count)
            }

    def __new__(cls, *values: Any, **results: Any) -> Self:
        """An output of the given results, by name; None counts as not given."""
        if values:  # How frameworks put a named tuple together again.
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
        """The result of this name, or the default if there is none."""
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
        return key in self._fields  # Not by comparing with the results, which are arrays.

    def __setattr__(self, name: str, value: Any) -> None:
        # What `output.loss += more` assigns is the tensor that it has changed in place.
        if name not in self._fields or getattr(self, name) is not value:
            raise AttributeError(
                f"{name} of a {type(self).__name__} cannot be assigned, as outputs are tuples; make another one: "
                f"{type(self).__name__}(**{{**outputs, {name!r}: value}})"
            )

    def __setitem__(self, name: Any, value: Any) -> None:
        setattr(self, name if isinstance(name, str) else self._fields[name], value)

    # Two outputs are equal if they are the same: comparing the arrays has no single answer.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self).__bases__[0], dict(self.items()))


class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """Result of the decoder.

    Attributes:
        last_hidden_state: [batch, length, d_model], after the final norm.
        past_key_values: the cache, if asked for.
        hidden_states: num_layers + 1 arrays [batch, length, d_model], if asked for: the input of each block, then
            `last_hidden_state`.
        attentions: num_layers arrays [batch, heads, length, keys], if asked for: the probabilities by which each
            position weighs the cached and the new ones, after the head mask.
        cross_attentions: the same over the encoder's positions, if there are any.
    """

    names = ("last_hidden_state", "past_key_values", "hidden_states", "attentions", "cross_attentions")
    __slots__ = ()


class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Result of the causal language model.

    Attributes:
        loss: float32 scalar, if there were labels: the mean over the labels that count.
        logits: [batch, kept positions, vocab_size].
        past_key_values, hidden_states, attentions, cross_attentions: as in
            `BaseModelOutputWithPastAndCrossAttentions`.
    """

    names = ("loss", "logits", "past_key_values", "hidden_states", "attentions", "cross_attentions")
    __slots__ = ()


class GenerateOutput(ModelOutput):
    """Result of `generate` with `return_dict_in_generate=True`.

    Attributes:
        sequences: ids [rows, prompt + new]; the rows of a prompt's `num_return_sequences` follow each other.
        sequences_scores: of a beam search, the log-probability of each row's new tokens, divided by their number to the
            power `length_penalty` [rows].
        scores: if asked for, what each step chose from: log-probabilities of a beam search, logits otherwise, with
            penalties and bans; a tuple of float32 [rows or beams, vocab_size].
        logits: if asked for, the same as they left the model.
        beam_indices: of a beam search, the beam, counted over all prompts, that each new token continued [rows, new];
            -1 after the end.
        past_key_values: the cache of all columns but the last, in which what follows the end of a row is padding; None
            of a beam search, or if `use_cache` is False.
    """

    names = ("sequences", "sequences_scores", "scores", "logits", "beam_indices", "past_key_values")
    __slots__ = ()


def _unpickled(cls: type[ModelOutput], results: dict[str, Any]) -> ModelOutput:
    return cls(**results)
