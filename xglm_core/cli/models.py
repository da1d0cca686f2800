"""Arguments and loading of models, for the commands that run one."""

from __future__ import annotations

import argparse
import os
from typing import Any

from xglm_core.backends import BACKENDS, load_backend
from xglm_core.checkpoint.dtypes import DTYPES
from xglm_core.cli import add_checkpoint
from xglm_core.compare.run import installed_backends
from xglm_core.errors import BackendError, InputError


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `checkpoint`, `revision`, `backend`, `dtype` and `device`."""
    add_checkpoint(parser)
    parser.add_argument("--backend", choices=["auto", *BACKENDS], default="auto", help="(the first that is installed)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the computation (%(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="where PyTorch computes, as in cuda:1 (cpu)")


def load_model(arguments: argparse.Namespace) -> tuple[str, Any]:
    """`load` with the arguments of `add_model`."""
    return load(arguments.checkpoint, arguments.revision, arguments.backend, arguments.dtype, arguments.device)


def load(checkpoint: str, revision: str | None, backend: str, dtype: str, device: str | None = None) -> tuple[str, Any]:
    """Loads a causal language model; returns the name of the backend and the model.

    Args:
        checkpoint: a folder, or a repository on the Hugging Face Hub.
        revision: a branch, tag or commit of the repository; None means its main branch.
        backend: the name of the backend, or "auto" for the first that is installed.
        dtype: the type of the computation, one of `DTYPES`.
        device: see `place_model`.

    Raises:
        BackendError: the backend, or any backend, is not installed.
        InputError: see `place_model`.
        XGLMError: the checkpoint cannot be loaded.
    """
    if backend == "auto":
        installed, missing = installed_backends()
        if not installed:
            raise BackendError(f"no backend is installed: {'; '.join(missing)}")
        backend = installed[0]
    # Users of the command have no reason to set these. Keras may be configured for another backend.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    model_class = getattr(load_backend(backend), BACKENDS[backend].causal_lm)
    types = {"dtype": dtype, "param_dtype": dtype} if backend == "flax" else {"dtype": dtype}
    model = model_class.from_pretrained(checkpoint, revision=revision, **types)
    place_model(model, backend, device)
    return backend, model


def place_model(model: Any, backend: str, device: str | None) -> None:
    """Moves a model to a device of PyTorch, by name; None leaves it where it is.

    Raises:
        InputError: there is no such device; or another backend is used, which chooses its device itself.
    """
    if device is None:
        return
    if backend != "torch":
        raise InputError(f"device is {device!r}, but {backend} chooses its device itself; leave it out")
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for CUDA.
        reason = str(error).partition("\n")[0]
        raise InputError(f"device is {device!r}, expected cpu or a device that PyTorch has here: {reason}") from None
