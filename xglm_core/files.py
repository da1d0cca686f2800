"""Writing files so that an interrupted write loses nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends well.

    Until then the old file stays whole; readers that have it mapped keep the old bytes afterwards. If the block fails,
    the temporary file is removed and the error goes on.
    """
    path = Path(path)
    # Not `tempfile`, whose files only their owner may read: a checkpoint has the user's usual mode.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
