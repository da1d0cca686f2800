"""What the commands that run a model share: its arguments, and how it is loaded."""

from __future__ import annotations

import argparse
import os
from typing import Any

from xglm_core.backends import BACKENDS, load_backend
from xglm_core.checkpoint.dtypes import DTYPES
from xglm_core.cli import add_checkpoint
from xglm_core.compare.run import installed_backends
from xglm_core.errors import BackendError


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `checkpoint`, `revision`, `backend` and `dtype`."""
    add_checkpoint(parser)
    parser.add_argument("--backend", choices=["auto", *BACKENDS], default="auto", help="(the first that is installed)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the computation (%(default)s)")


def load_model(arguments: argparse.Namespace) -> tuple[str, Any]:
    """`load` with what `add_model` added."""
    return load(arguments.checkpoint, arguments.revision, arguments.backend, arguments.dtype)


def load(checkpoint: str, revision: str | None, backend: str, dtype: str) -> tuple[str, Any]:
    """The name of the backend, and its causal language model.

    Args:
        checkpoint: a folder, or a repository on the Hugging Face Hub.
        revision: branch, tag or commit of that; None for its main branch.
        backend: its name, or "auto" for the first that is installed.
        dtype: the type of the computation, one of `DTYPES`.

    Raises:
        BackendError: it is not installed, or none is.
        XGLMError: the checkpoint cannot be loaded.
    """
    if backend == "auto":
        installed, missing = installed_backends()
        if not installed:
            raise BackendError(f"no backend is installed: {'; '.join(missing)}")
        backend = installed[0]
    # What a user of the command has no reason to set. Keras may be configured for another backend.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    model_class = getattr(load_backend(backend), BACKENDS[backend].causal_lm)
    types = {"dtype": dtype, "param_dtype": dtype} if backend == "flax" else {"dtype": dtype}
    return backend, model_class.from_pretrained(checkpoint, revision=revision, **types)
