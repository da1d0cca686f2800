"""Reads the input of `xglm score` and `xglm generate`: lines of text or JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from xglm_core.errors import InputError
from xglm_core.scoring.texts import Item

STDIN = "-"

_EXPECTED = 'expected {"text": ...}, or {"context": ..., "continuation": ...}, with strings'


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Opens a file, or standard input.

    Raises:
        InputError: it cannot be opened.
    """
    if path == STDIN:
        yield standard_input()
        return
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    with file:
        yield file


def standard_input() -> BinaryIO:
    """Standard input, as bytes.

    Raises:
        InputError: it is closed.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed, expected lines; redirect it from a file")
    return sys.stdin.buffer


def read_items(lines: Iterable[bytes], path: str) -> Iterator[tuple[str, Item]]:
    """Yields the text or pair of each line, with a name of the line for messages.

    If the first line begins with "{", all lines are JSON, else text.

    Raises:
        InputError: there are no lines; or a line, which the message names, is not UTF-8, empty, or JSON of another
            form.
    """
    name = "standard input" if path == STDIN else path
    is_json = None
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: byte {error.start} is no UTF-8, expected UTF-8 text") from None
        if is_json is None:
            is_json = text.startswith("{")
        if not text.strip():
            raise InputError(f"{where}: the line is empty, expected {'JSON' if is_json else 'a text'}; remove it")
        yield where, _parsed(text, where) if is_json else text
    if is_json is None:
        raise InputError(f"{name}: is empty, expected at least one line")


def count_items(path: str) -> int | None:
    """Checks all lines of a file before anything is computed; returns None for an input that can be read only once.

    Raises:
        InputError: see `read_items`.
    """
    if path == STDIN or Path(path).is_fifo() or Path(path).is_char_device():
        return None
    with opened(path) as file:
        return sum(1 for _ in read_items(file, path))


def _parsed(line: str, where: str) -> Item:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: {error}, {_EXPECTED}; the first line, which begins with {{, makes it JSON"
        ) from None
    names = {"text", "context", "continuation"} & {*values} if isinstance(values, dict) else set()
    if names not in ({"text"}, {"context", "continuation"}) or not all(isinstance(values[name], str) for name in names):
        raise InputError(f"{where}: {line!r:.80} is another form of JSON, {_EXPECTED}")
    return values["text"] if "text" in values else (values["context"], values["continuation"])
