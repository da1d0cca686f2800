"""Saving weights that are spread over processes: all of them gather each weight, and the first one writes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from xglm_core.errors import CheckpointError
from xglm_flax.weights import Params

Read = Callable[[str], np.ndarray]

_DONE, _FAILED = -1, -2


@contextlib.contextmanager
def first_process_reads(params: Params, names: Sequence[str], read: Read) -> Iterator[Read | None]:
    """Lets the first process read weights by name; the others help until it has finished.

    Differs: in PyTorch the processes send each other names, and here the places of names.

    Args:
        params: if each process has all of them, every process gets `read` as it is.
        names: of the weights, in the same order in all processes.
        read: reads a weight. If the weight is spread over processes, all of them have to call it, in the same order.

    Yields:
        How to read; None in the processes that help.

    Raises:
        CheckpointError: in a process that helps: the first one failed.
    """
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(params)):
        yield read
        return
    if jax.process_index() != 0:
        yield None
        while (place := _sent_by_first(0)) >= 0:
            read(names[place])
        if place == _FAILED:
            raise CheckpointError("the first process could not write the checkpoint; its own error says why")
        return

    lock = threading.Lock()  # Several threads write, but all processes gather in the same order.

    def asking(name: str) -> np.ndarray:
        with lock:
            _sent_by_first(names.index(name))
            return read(name)

    last = _FAILED
    try:
        yield asking
        last = _DONE
    finally:
        _sent_by_first(last)


def _sent_by_first(number: int) -> int:
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
