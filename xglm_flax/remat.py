"""What the backward pass computes again. Differs: in PyTorch this is part of the decoder; Keras does not have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from xglm_core.errors import InputError

Remat = str | Callable[..., Any]
_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat_policy(remat: Remat) -> Callable[..., Any] | None:
    """What is kept of each block for the backward pass, which computes the rest again.

    Args:
        remat: "none": everything. "dots": the results of the projections and the feed-forward part, but not those of
            attention. "full": the block's input. Or a policy of `jax.checkpoint_policies`, for which the projections'
            results have names: those of their layers, "q_proj" or "fc1".

    Raises:
        InputError: it is something else.
    """
    if remat == "none" or callable(remat):
        return None if isinstance(remat, str) else remat
    if remat not in _POLICIES:
        raise InputError(f"remat is {remat!r}, expected 'none', 'dots', 'full', or a policy of jax.checkpoint_policies")
    return _POLICIES[remat]
