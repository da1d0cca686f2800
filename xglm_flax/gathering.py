"""Weights that lie in several processes, for one to write, though all of them have to take part in reading each."""

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
    """Gives the first process a way to read weights by name, and lets the others help until it has finished.

    Differs: what the processes tell each other are numbers.

    Args:
        params: if each process has all of them to itself, `read` is given to every process as it is.
        names: of the weights, in the same order in all processes.
        read: reads a weight; if it lies in several processes only if all of them call it, in the same order.

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
        while (said := _said_by_first(0)) >= 0:
            read(names[said])
        if said == _FAILED:
            raise CheckpointError("the first process could not write the checkpoint; its own error says why")
        return

    alone = threading.Lock()  # Weights are written by several threads, and gathered in one order.

    def asking(name: str) -> np.ndarray:
        with alone:
            _said_by_first(names.index(name))
            return read(name)

    last = _FAILED
    try:
        yield asking
        last = _DONE
    finally:
        _said_by_first(last)


def _said_by_first(number: int) -> int:
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
