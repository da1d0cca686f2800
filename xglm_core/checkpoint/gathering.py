"""Saving weights that are spread over processes: all of them gather each weight, and the first one writes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from xglm_core.errors import CheckpointError

Read = Callable[[str], np.ndarray]

_DONE, _FAILED = -1, -2


@contextlib.contextmanager
def first_process_reads(
    read: Read, names: Sequence[str], rank: int, broadcast: Callable[[int, str], tuple[int, str]]
) -> Iterator[Read | None]:
    """Gives the first process a function that reads weights by name. The others help until it has finished.

    Args:
        read: reads a weight; all processes have to call it, in the same order.
        names: of the weights, in the same order in all processes.
        rank: the number of this process.
        broadcast: returns in all processes what the first one gives it: the place of a name, or a code, and an error.

    Yields:
        How to read; None in the processes that help.

    Raises:
        CheckpointError: in a process that helps: the first one failed.
    """
    if rank != 0:
        yield None
        while (message := broadcast(0, ""))[0] >= 0:
            read(names[message[0]])
        if message[0] == _FAILED:
            raise CheckpointError(f"the first process could not write the checkpoint: {message[1]}")
        return

    alone = threading.Lock()  # Weights are written by several threads, and gathered in one order.

    def asking(name: str) -> np.ndarray:
        with alone:
            broadcast(names.index(name), "")
            return read(name)

    message = _DONE, ""
    try:
        yield asking
    except BaseException as caught:
        message = _FAILED, str(caught)
        raise
    finally:
        broadcast(*message)
