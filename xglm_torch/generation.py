"""The generation engine: prefill, steps and token selection on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from xglm_torch.cache import XGLMCache, empty_cache

if TYPE_CHECKING:
    from xglm_torch.causal_lm import XGLMForCausalLM


class TorchEngine:
    """Implements `xglm_core.generation.loop.Engine`.

    Differs: nothing is compiled and shapes are free, so `bucket` is 1 and the steps are a Python loop.
    """

    bucket = 1

    def __init__(self, model: XGLMForCausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, capacity: int) -> np.ndarray:
        """See `Engine.prefill`."""
        weight = self.model.model.embed_tokens.weight
        cache = empty_cache(self.model.config, len(input_ids), capacity, like=weight)
        mask = torch.from_numpy(attention_mask).to(weight.device)
        self._step(torch.from_numpy(input_ids).to(weight.device), mask, cache)
        return self._tokens[:, 0].numpy(force=True)

    @torch.inference_mode()
    def advance(self, steps: int) -> np.ndarray:
        """See `Engine.advance`."""
        selected = []
        for _ in range(steps):
            self._step(self._tokens, None, self._cache)
            selected.append(self._tokens)
        return torch.cat(selected, dim=1).numpy(force=True)

    def _step(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: XGLMCache) -> None:
        """Reads ids [rows, length]; afterwards `_tokens` holds the likeliest next ids [rows, 1]."""
        outputs = self.model(input_ids, attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache: XGLMCache = outputs.past_key_values
        self._tokens: torch.Tensor = outputs.logits.argmax(dim=-1)
