"""Converts numpy values to plain Python values."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """Converts numpy scalars and arrays to Python numbers and lists, also inside lists, tuples and dictionaries.

    Other values stay as they are.
    """
    # numpy is looked up, not imported: a configuration does not need it.
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return {plain(key): plain(item) for key, item in value.items()} if type(value) is dict else value
