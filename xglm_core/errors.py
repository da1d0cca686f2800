"""The errors that a user's input can cause.

Every message is one line and says what is wrong, what was expected, what was found and what to do. The command line
prints these without a traceback; any other exception is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


class XGLMError(Exception):
    """Base of all errors below."""

    if not TYPE_CHECKING:
        # TensorFlow looks at this attribute to raise such an error again from traced code.
        __init__ = Exception.__init__


class ConfigError(XGLMError, ValueError):
    """A value of the configuration is impossible, or its file cannot be read."""


class CheckpointError(XGLMError, ValueError):
    """A checkpoint is absent, damaged, or does not fit the model."""


class InputError(XGLMError, ValueError):
    """An argument of a call is outside what the model can compute."""


class InputTypeError(InputError, TypeError):
    """An argument of a call is of a type that it cannot have."""


class BackendError(XGLMError, ImportError):
    """A framework or an optional package is not installed or cannot be used."""
