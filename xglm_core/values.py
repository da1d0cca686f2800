"""Numbers as people have them, as Python's."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """Numpy's numbers, truth values and arrays as Python's and lists, inside lists, tuples and dictionaries, too.

    Anything else stays as it is.
    """
    # By name: a configuration needs no numpy, and whoever has its numbers has imported it.
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return {plain(key): plain(item) for key, item in value.items()} if type(value) is dict else value
