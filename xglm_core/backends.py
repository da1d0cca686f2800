"""The backends by name, with the packages and frameworks that each needs."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

from xglm_core.errors import BackendError


@dataclass(frozen=True)
class Backend:
    """One backend.

    Attributes:
        name: the name for users and of the pip extra: "torch", "tf" or "flax".
        package: our import package.
        frameworks: the import packages of the frameworks that it needs.
        causal_lm: the name of its causal-LM class.
    """

    name: str
    package: str
    frameworks: tuple[str, ...]
    causal_lm: str


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch", "xglm_torch", ("torch",), "XGLMForCausalLM"),
        Backend("tf", "xglm_tf", ("tensorflow", "keras"), "TFXGLMForCausalLM"),
        Backend("flax", "xglm_flax", ("jax", "flax"), "FlaxXGLMForCausalLM"),
    )
}


def require_frameworks(name: str) -> None:
    """Checks, without importing anything, that a backend's frameworks are installed.

    Raises:
        BackendError: a framework is missing, or there is no such backend; the message names the pip extra.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}; expected one of {', '.join(BACKENDS)}")
    missing = [framework for framework in BACKENDS[name].frameworks if importlib.util.find_spec(framework) is None]
    if missing:
        raise BackendError(
            f"the {name} backend needs {' and '.join(missing)}, not installed here; run: pip install 'xglm[{name}]'"
        )


def load_backend(name: str) -> ModuleType:
    """Imports a backend's package.

    Raises:
        BackendError: see `require_frameworks`.
    """
    require_frameworks(name)
    return importlib.import_module(BACKENDS[name].package)
