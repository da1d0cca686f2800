"""From logits to tokens, on the device: the array operations of `xglm_core.generation.selection`."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from xglm_core.generation.rules import Rules
from xglm_core.generation.selection import DeviceRules, Selection


def device_rules(rules: Rules, device: torch.device) -> DeviceRules:
    """The rules with their arrays on a device. Differs: TF and Flax have this in `CompiledEngine`."""
    return DeviceRules.of(rules, lambda value: _on(device, value), compiled=False)


def _on(device: torch.device, value: Any) -> Any:
    return torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value


def _put(array: torch.Tensor, ids: torch.Tensor, values: Any) -> torch.Tensor:
    # One more column takes what lies beyond the last one.
    columns = torch.cat([array, array.new_zeros(len(array), 1)], dim=1)
    return columns.scatter(1, ids.long().clamp(max=array.shape[1]), values)[:, :-1]


def _top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if count < scores.shape[1]:
        return scores.topk(count)
    return scores.sort(dim=-1, descending=True, stable=True)


selection = Selection(
    float32=torch.Tensor.float,
    reshape=torch.reshape,
    broadcast_to=torch.broadcast_to,
    full_like=torch.full_like,
    where=torch.where,
    put=_put,
    take=lambda array, places: array.gather(1, places),
    iota=lambda array: torch.arange(array.shape[1], device=array.device).expand_as(array),
    max=lambda array: array.amax(dim=-1, keepdim=True),
    argmax=lambda array: array.argmax(dim=-1),
    top=_top,
    argsort=lambda array: array.argsort(dim=-1, stable=True),
    isnan=torch.isnan,
    exp=torch.exp,
    log=torch.log,
    log1p=torch.log1p,
    softmax=lambda array: array.softmax(dim=-1),
    log_softmax=lambda array: array.log_softmax(dim=-1),
    cumsum=lambda array: array.cumsum(dim=-1),
    sum=lambda array: array.sum(dim=-1, keepdim=True),
    logsumexp=lambda array: array.logsumexp(dim=-1, keepdim=True),
    # Differs: PyTorch has no uint32 arithmetic, so words live in the low half of int64.
    uint32=torch.Tensor.long,
    low_bits=lambda bits: bits & 0xFFFFFFFF,
    right_shift=operator.rshift,
)
