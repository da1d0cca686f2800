"""The scoring engine: log-probabilities of given tokens, tile by tile of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.scoring import engine
from xglm_torch.fast.linear import FastLinear, linear
from xglm_torch.int8 import Int8Linear, int8_linear
from xglm_torch.loss import has_plain_weight

if TYPE_CHECKING:
    from xglm_torch.causal_lm import XGLMForCausalLM


class TorchScorer:
    """Implements `xglm_core.scoring.engine.ScoringEngine`.

    Differs: TF and Flax have a `CompiledScorer`, for fixed shapes. Here they are free: `bucket` is 1, and the chunks
    are a Python loop.
    """

    bucket = 1

    def __init__(self, model: XGLMForCausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def log_probabilities(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, sources: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ScoringEngine.log_probabilities`."""
        device, head = self.model.device, self.model.lm_head
        ids, mask = (torch.from_numpy(array).to(device) for array in (input_ids.astype(np.int64), attention_mask))
        states = self.model.model(DecoderInputs(ids, mask), None, Wanted()).last_hidden_state.flatten(0, 1)
        chunk = engine.TILE_POSITIONS
        if not (has_plain_weight(head) or isinstance(head, Int8Linear)):
            chunk = max(1, engine.TILE_POSITIONS * engine.TILE_VOCABULARY // self.model.config.vocab_size)
        places, wanted = (torch.from_numpy(array).to(states.device) for array in (sources, targets))
        found = [
            _of_targets(head, states[at], tokens)
            for at, tokens in zip(places.split(chunk), wanted.split(chunk), strict=True)
        ]
        scores, likeliest = (torch.cat(parts).numpy(force=True) for parts in zip(*found, strict=True))
        return scores, likeliest


def _of_targets(head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each target, and the likeliest id; of several, the lowest.

    Args:
        head: gives logits [positions, vocab_size].
        states: [positions, d_model].
        targets: ids [positions].

    Returns:
        float32 and int64 [positions].
    """
    max_logit = torch.full(targets.shape, -torch.inf, dtype=torch.float32, device=states.device)
    likeliest = torch.zeros_like(targets)
    sum_exp = torch.zeros_like(max_logit)
    of_targets = torch.zeros_like(max_logit)
    for begin, logits in _logit_blocks(head, states):
        inside = (targets >= begin) & (targets < begin + logits.shape[1])
        of_targets[inside] = logits[inside, targets[inside] - begin]
        max_of_block, places = logits.max(dim=1)
        likeliest = torch.where(max_of_block > max_logit, begin + places, likeliest)
        before, max_logit = max_logit, torch.maximum(max_logit, max_of_block)
        # In place, because fresh memory of this size costs more than the arithmetic.
        sum_exp = sum_exp * (before - max_logit).exp() + logits.sub_(max_logit[:, None]).exp_().sum(dim=1)
    return of_targets - max_logit - sum_exp.log(), likeliest


def _logit_blocks(head: nn.Module, states: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Fresh float32 logits [positions, block] of one part of the vocabulary after the other, with its first id."""
    product: Any = linear if isinstance(head, FastLinear) else F.linear
    if isinstance(head, Int8Linear):
        for begin in range(0, len(head.weight), engine.TILE_VOCABULARY):
            rows = slice(begin, begin + engine.TILE_VOCABULARY)
            yield begin, int8_linear(states, head.weight[rows], head.weight_scale[rows]).float()
            head.release()
    elif has_plain_weight(head):
        for begin in range(0, len(head.weight), engine.TILE_VOCABULARY):
            yield begin, product(states, head.weight[begin : begin + engine.TILE_VOCABULARY]).float()
    else:
        yield 0, head(states).to(torch.float32, copy=True)
