"""What compiled programs hold: the equations of JAX's, and the shapes in XLA's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any


def equations(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """All equations that JAX traces, those inside loops and calls, too."""
    import jax

    def of(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from of(inner)

    return of(jax.make_jaxpr(function)(*arguments).jaxpr)


def computed_shapes(function: Callable[..., Any], *arguments: Any) -> set[tuple[int, ...]]:
    """The shapes of all arrays that JAX is told to compute."""
    return {variable.aval.shape for equation in equations(function, *arguments) for variable in equation.outvars}


def shapes_in(hlo: str) -> set[tuple[int, ...]]:
    """The shapes that are written in the text of an XLA program."""
    return {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", hlo)}
