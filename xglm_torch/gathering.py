"""Lets one process write the weights of a sharded model. All processes take part in reading each weight."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from xglm_core.errors import CheckpointError

Read = Callable[[str], np.ndarray]


def reshard(model: nn.Module) -> None:
    """Has FSDP release the weights that it gathered for a call, perhaps in another type. Else it does nothing."""
    for module in model.modules():
        release: Any = getattr(module, "reshard", None)
        if release is not None:
            release()


@contextlib.contextmanager
def first_process_reads(model: nn.Module, read: Read) -> Iterator[Read | None]:
    """Gives the first process a function that reads weights by name. The others help until it has finished.

    Args:
        model: if it is not sharded, `read` is given to every process as it is.
        read: reads a weight; of a sharded model only if all processes call it, in the same order.

    Yields:
        How to read; None in the processes that help.

    Raises:
        CheckpointError: in a process that helps: the first one failed.
    """
    if not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        yield read
        return
    if dist.get_rank() != 0:
        yield None
        while (message := _said_by_first(None))["name"] is not None:
            read(message["name"])
        if message["error"] is not None:
            raise CheckpointError(f"the first process could not write the checkpoint: {message['error']}")
        return

    alone = threading.Lock()  # Weights are written by several threads, and gathered in one order.

    def asking(name: str) -> np.ndarray:
        with alone:
            _said_by_first({"name": name, "error": None})
            return read(name)

    error = None
    try:
        yield asking
    except BaseException as caught:
        error = str(caught)
        raise
    finally:
        _said_by_first({"name": None, "error": error})


def _said_by_first(message: dict[str, Any] | None) -> dict[str, Any]:
    messages = [message]
    dist.broadcast_object_list(messages, src=0)
    assert messages[0] is not None
    return messages[0]
