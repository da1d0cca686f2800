"""How often programs are traced: a warm one is not traced again, whatever values it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class Traces:
    """The traces of one program.

    Args:
        count: says how many there have been.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self.count = count

    @contextlib.contextmanager
    def none(self, what: str) -> Iterator[None]:
        """Fails if the program is traced inside; `what` names the argument or the call that could cause it."""
        before = self.count()
        assert before, "the program has not been traced at all"
        yield
        assert self.count() == before, f"{what}: the program was traced again, {self.count() - before} times"

    @contextlib.contextmanager
    def some(self, what: str) -> Iterator[None]:
        """Fails if the program is not traced inside, where it has to be another one."""
        before = self.count()
        yield
        assert self.count() > before, f"{what}: the program was not traced"


class CountedActivation(Traces):
    """An activation function for the configuration of a Flax model, which is called only when a block is traced.

    Attributes:
        activation: the function.
        shapes: those that it was traced with, in order.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.shapes: list[tuple[int, ...]] = []
        super().__init__(lambda: len(self.shapes))

        def activation(states: Any) -> Any:  # No method: a configuration that is copied would copy this object, too.
            self.shapes.append(states.shape)
            return function(states)

        self.activation = activation


def traces_of_tf(function: Any) -> Traces:
    """Those of a `tf.function`."""
    return Traces(function.experimental_get_tracing_count)


def traces_of_jax(function: Any) -> Traces:
    """Those of a function from `jax.jit`."""
    return Traces(function._cache_size)
