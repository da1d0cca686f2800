"""Whether to use the plain forms in place of everything in the `fast` folders of the backends."""

from __future__ import annotations

import os


def use_plain() -> bool:
    """Whether the environment has `XGLM_PLAIN=1`. Existing models and compiled code keep the forms that they have."""
    return os.environ.get("XGLM_PLAIN", "") not in ("", "0")
