"""Writing files so that an interrupted write loses nothing."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# How the file begins that git checks out in place of a large one, where Git LFS is not installed.
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_REASON = (
    "is a Git LFS pointer, not the file that it stands for; run: git lfs install && git lfs pull, or download the file"
)

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends well.

    Until then the old file stays whole; readers that have it mapped keep the old bytes afterwards. If the block fails,
    the temporary file is removed and the error goes on.
    """
    path = Path(path)
    # Not `tempfile`, whose files only their owner may read: a checkpoint has the user's usual mode.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as file:
            # The lock keeps others from taking the file for a leftover. Some disks know none: NFS, Lustre, FUSE.
            with contextlib.suppress(OSError):
                _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed processes left.

    Those of running ones are locked, and stay; where the disk knows no locks, all of them do.
    """
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            # NFS locks for writing only what is open for it.
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                _lock(file)
                path.unlink()


def _lock(file: BinaryIO) -> None:
    """Locks a file until it is closed, or its process ends; an `OSError` if another process has it locked."""
    if sys.platform != "win32":  # Which refuses to remove open files anyway.
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
