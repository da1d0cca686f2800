"""Suspends Python's garbage collector while batches are encoded."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def without_collection(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function run without the collector of reference cycles.

    A batch is a list of lists of integers for each text. The collector would traverse all of them again and again, in
    search of cycles that such lists cannot form. That takes a quarter of the time of encoding a batch.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not gc.isenabled():  # Only the thread that stopped the collector starts it again.
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return run
