"""Per-line output of commands: to standard output, or to a file that a later run can resume."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from xglm_core.errors import InputError
from xglm_core.files import replacing

STDOUT = "-"

_ROW_BEGIN = '{"line": '  # A row of JSON begins so; a row of a table begins with the number.
_NUMBER = re.compile(rf"(?:{re.escape(_ROW_BEGIN)})?(\d+)[,\t]")
_FLOAT = re.compile(r"(-?\d+(?:\.\d+(?:e[+-]\d+)?|e[+-]\d+))")


class Output:
    """Writes rows for consecutive lines of an input.

    An existing file is resumed; a half-written last row is dropped. The last input line in the file is computed again,
    and its new rows must agree with the old ones before anything changes. So rows for different texts, checkpoints or
    options are never mixed. A pipe or /dev/null just takes the rows.

    Args:
        path: the file; None or "-" means standard output.
        header: the first row; empty for none.

    Attributes:
        first: the first input line to compute.

    Raises:
        InputError: the file cannot be written, or is not the output of such a run.
    """

    def __init__(self, path: str | None, header: str) -> None:
        self.path, self.first = path, 1
        self._header = header
        self._to_write = [header] if header else []
        self._old: list[str] = []
        self._end: int | None = None  # Where to resume in the file; None afterwards.
        self._file: BinaryIO = sys.stdout.buffer
        self._owned = path not in (None, STDOUT)
        if path is not None and self._owned:
            try:
                if os.path.exists(path) and not os.path.isfile(path):
                    self._file = open(path, "wb")  # noqa: SIM115
                    return
                # "a" could not overwrite the end, and "w" would lose the contents.
                self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            except OSError as error:
                raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
            self._find_end()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self._owned:
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # The first error counts.
                self._file.close()

    def write(self, number: int, rows: Sequence[str]) -> None:
        """Writes the rows for one line of the input.

        Raises:
            InputError: the file already has other rows for it.
        """
        if self._old:
            if len(self._old) > len(rows) or not all(map(_agree, self._old, rows)):
                raise InputError(
                    f"{self.path}: has other rows for line {number}, from another input, checkpoint or option; "
                    "resume with the same, or choose another file"
                )
            self._old = []
        if self._end is not None:
            self._file.seek(self._end)
            self._file.truncate()
            self._end = None
        self._file.write("".join(f"{row}\n" for row in (*self._to_write, *rows)).encode())
        self._to_write = []

    def flush(self) -> None:
        """Flushes the rows.

        Raises:
            InputError: they cannot be written; for example, the disk is full.
        """
        try:
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            where = self.path if self._owned else "standard output"
            raise InputError(f"{where}: cannot be written: {error.strerror or error}") from None

    def finish(self) -> None:
        """Checks that the input was long enough.

        Raises:
            InputError: it ended before the last line that the file has rows for.
        """
        if self._old:
            raise InputError(
                f"{self.path}: has rows up to line {self.first}, but the input is shorter; choose another file"
            )

    def _find_end(self) -> None:
        """Finds the last input line in the file, and where its rows begin."""
        begin = end = place = 0
        for place, line in enumerate(self._file, start=1):
            row = line.removesuffix(b"\n").decode(errors="replace")
            if not self._is_ours(row, place, is_whole=line.endswith(b"\n")):
                self._file.close()
                raise InputError(f"{self.path}: row {place} does not belong to such an output; choose another file")
            if not line.endswith(b"\n"):
                break
            number = _number_of(row)
            if number is None:
                self._to_write, begin = [], len(line)
            elif not self._old or number != self.first:
                self.first, self._old, begin = number, [row], end
            else:
                self._old.append(row)
            end += len(line)
        self._end = begin

    def _is_ours(self, row: str, place: int, *, is_whole: bool) -> bool:
        """Whether a run with these options can have written a row, or a part of it."""
        if place > 1:
            return _number_of(row) is not None or not is_whole
        begin = self._header or _ROW_BEGIN
        return row.startswith(begin) if is_whole else begin.startswith(row[: len(begin)])


def _number_of(row: str) -> int | None:
    """The number at the begin of a row; None if it is not a row of ours."""
    found = _NUMBER.match(row)
    return int(found[1]) if found else None


def _agree(old: str, new: str) -> bool:
    """Whether two rows agree: numbers up to differences by batching and rounding, the rest exactly.

    The tolerance is that of bfloat16. Another model, stride or treatment of line breaks differs by far more.
    """
    old_parts, new_parts = _FLOAT.split(old), _FLOAT.split(new)
    return old_parts[::2] == new_parts[::2] and all(
        abs(float(one) - float(other)) <= 0.05 * (1 + abs(float(other)))
        for one, other in zip(old_parts[1::2], new_parts[1::2], strict=True)
    )


@contextlib.contextmanager
def written_file(path: str | None) -> Iterator[BinaryIO | None]:
    """Opens a file that appears once it is complete; yields None without a path. A pipe is written directly."""
    if path is None:
        yield None
        return
    if path == STDOUT:
        yield sys.stdout.buffer
        return
    with contextlib.ExitStack() as stack:
        try:
            is_file = os.path.isfile(path) or not os.path.exists(path)
            file = stack.enter_context(replacing(path) if is_file else open(path, "wb"))  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
        yield file
