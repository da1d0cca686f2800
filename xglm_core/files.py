"""Writes files so that an interruption loses nothing."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Without Git LFS, git checks out a small file that begins like this in place of a large one.
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_REASON = (
    "is a Git LFS pointer, not the file that it stands for; run: git lfs install && git lfs pull, or download the file"
)

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends well.

    Until then the old file stays complete. Readers that have mapped it keep the old bytes afterwards. If the block
    fails, the temporary file is removed and the error is raised.
    """
    path = Path(path)
    # Not `tempfile`: only the owner could read the file, but checkpoints have the user's usual mode.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as file:
            # The lock shows others that the file is no leftover. Some disks have no locks: NFS, Lustre, FUSE.
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
    """Removes the temporary files of killed processes.

    The files of running processes are locked, and stay. On a disk without locks, all files stay.
    """
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            # On NFS, only a file that is open for writing can be locked for writing.
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                _lock(file)
                path.unlink()


def _lock(file: BinaryIO) -> None:
    """Locks a file until it is closed, or its process ends; an `OSError` if another process has it locked."""
    if sys.platform != "win32":  # Windows refuses to remove open files anyway.
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
