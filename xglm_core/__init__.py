"""The framework-free core of XGLM: configuration, tokenizers, weights, checkpoints, generation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xglm_core.checkpoint.convert import convert_checkpoint
    from xglm_core.checkpoint.folder import open_checkpoint
    from xglm_core.config import XGLMConfig
    from xglm_core.generation.config import GenerationConfig
    from xglm_core.generation.streaming import TextStreamer
    from xglm_core.tokenization.fast import XGLMTokenizerFast
    from xglm_core.tokenization.sentencepiece import XGLMTokenizer

__version__ = "0.1.0"

# Loaded on first use, so that `import xglm_core` is fast.
_HOMES = {
    "GenerationConfig": "xglm_core.generation.config",
    "TextStreamer": "xglm_core.generation.streaming",
    "XGLMConfig": "xglm_core.config",
    "XGLMTokenizer": "xglm_core.tokenization.sentencepiece",
    "XGLMTokenizerFast": "xglm_core.tokenization.fast",
    "convert_checkpoint": "xglm_core.checkpoint.convert",
    "open_checkpoint": "xglm_core.checkpoint.folder",
}

__all__ = [
    "GenerationConfig",
    "TextStreamer",
    "XGLMConfig",
    "XGLMTokenizer",
    "XGLMTokenizerFast",
    "convert_checkpoint",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xglm_core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
