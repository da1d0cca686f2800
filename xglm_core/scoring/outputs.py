"""Where `xglm score` writes: standard output, or a file that an interrupted run goes on with."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import BinaryIO

from xglm_core.errors import InputError
from xglm_core.scoring.rows import agree, number_of


class Output:
    """Rows of consecutive lines of an input.

    A file goes on after what it already holds; a half-written last row is dropped. The last line of the input that it
    speaks of is scored again, and nothing changes before the new rows have been compared with the old ones: so rows of
    another text, checkpoint or option are not mixed with these.

    Args:
        path: the file; None for standard output.
        header: the row to begin with; empty for none.

    Attributes:
        first: the first line of the input to score.

    Raises:
        InputError: the file cannot be written, or is no output of such a run.
    """

    def __init__(self, path: str | None, header: str) -> None:
        self.path, self.first = path, 1
        self._old: list[str] = []
        self._file: BinaryIO = sys.stdout.buffer
        if path is not None:
            try:
                # Appending would not let the end be overwritten, and "w" would lose what is there.
                self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            except OSError as error:
                raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
            if self._find_end(header):
                return
        if header:
            self._put([header])

    def write(self, number: int, rows: Sequence[str]) -> None:
        """Writes the rows of one line of the input.

        Raises:
            InputError: the file already has other rows of it.
        """
        if self._old:
            if len(self._old) > len(rows) or not all(map(agree, self._old, rows)):
                raise InputError(
                    f"{self.path}: holds other scores of line {number}, those of another input, checkpoint or option; "
                    "go on with the same, or choose another file"
                )
            self._old = []
            self._file.truncate()
        self._put(rows)

    def flush(self) -> None:
        """Hands over what has been written."""
        self._file.flush()

    def finish(self) -> None:
        """Ends the output.

        Raises:
            InputError: the input ended before the line that the file speaks of last.
        """
        self.flush()
        if self._old:
            raise InputError(
                f"{self.path}: goes on to line {self.first}, but the input is shorter; choose another file"
            )

    def _find_end(self, header: str) -> bool:
        """Goes to where the rows of the last line begin that a file speaks of; False if it holds no whole row."""
        begin = end = 0
        for place, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            row = line[:-1].decode(errors="replace")
            number = 0 if header and place == 1 and row == header else number_of(row)
            if number is None or (header and place == 1 and number):
                raise InputError(f"{self.path}: row {place} is none of this kind of output; choose another file")
            if not self._old or number != self.first:
                self.first, self._old, begin = number, [], end
            self._old.append(row)
            end += len(line)
        if self.first == 0 or not self._old:  # A header alone, or nothing.
            self.first, self._old, begin = 1, [], end
        self._file.seek(begin)
        self._file.truncate(end)
        return end > 0

    def _put(self, rows: Sequence[str]) -> None:
        self._file.write("".join(f"{row}\n" for row in rows).encode())
