"""Whether the plain forms run in place of the fast ones: of everything in the `fast` folder of each backend."""

from __future__ import annotations

import os


def use_plain() -> bool:
    """Whether the environment says so: `XGLM_PLAIN=1`. Models and compiled code made before keep what they have."""
    return os.environ.get("XGLM_PLAIN", "") not in ("", "0")
