"""What a model call returns: the same classes and fields in all backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """Named results that also read as a mapping and as the tuple of those that are not None, in field order."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The results that are not None."""
        return tuple(value for value in self._values() if value is not None)

    def keys(self) -> tuple[str, ...]:
        """The names of the results that are not None."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()  # Not by comparing with the results, which are arrays.

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    # TensorFlow's protocol for classes that its functions may return; costs nothing elsewhere.
    def __tf_flatten__(self) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        return self.keys(), self.to_tuple()

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[str, ...], components: tuple[Any, ...]) -> Self:
        return cls(**dict(zip(metadata, components, strict=True)))

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, eq=False)
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """Result of the decoder.

    Attributes:
        last_hidden_state: [batch, length, d_model], after the final norm.
        past_key_values: the cache, if asked for.
        hidden_states: num_layers + 1 arrays [batch, length, d_model], if asked for: the input of each block, then
            `last_hidden_state`.
        attentions: reserved for the attention probabilities.
        cross_attentions: reserved for those over encoder states.
    """

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    cross_attentions: tuple[Any, ...] | None = None


@dataclass(frozen=True, eq=False)
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Result of the causal language model.

    Attributes:
        loss: reserved for the training loss.
        logits: [batch, kept positions, vocab_size].
        past_key_values, hidden_states, attentions, cross_attentions: as in
            `BaseModelOutputWithPastAndCrossAttentions`.
    """

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    cross_attentions: tuple[Any, ...] | None = None
