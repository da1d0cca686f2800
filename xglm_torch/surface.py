"""What `generate`, `stream` and `score` need to know of PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from xglm_core.calls import resolve
from xglm_core.generation.engine import is_overridden
from xglm_core.generation.prompts import Prompts
from xglm_core.generation.surface import GenerationSurface
from xglm_torch.cache import XGLMCache, as_cache
from xglm_torch.generation import TorchEngine, draw_seed
from xglm_torch.inputs import as_numpy, has_inner_door, is_traced
from xglm_torch.preparing import Preparation
from xglm_torch.pretrained import XGLMPreTrainedModel
from xglm_torch.scoring import TorchScorer


class TorchGeneration(GenerationSurface, XGLMPreTrainedModel):
    """A base of the causal language model: the methods that `GenerationSurface` asks for."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call of a decoding loop: the tokens that the cache does not hold yet.

        A method that replaces this one, of a subclass or of the model, is what `generate` asks.

        Args:
            input_ids: all tokens so far [rows, length].
            past_key_values: the cache of the earlier ones, or None. If it holds more than those, such as a prefix that
                has no ids, the last token alone is taken for new.
            attention_mask: 1 for tokens, 0 for padding [rows, length], or None.
            inputs_embeds: the prompt's embeddings, which take the place of ids in the first call.
            options: passed on.
        """
        past = as_cache(past_key_values, self.config)
        if past is None and inputs_embeds is not None:
            tokens = {"inputs_embeds": inputs_embeds}
        else:
            read = 0 if past is None else min(past.length, input_ids.shape[1] - 1)
            tokens = {"input_ids": input_ids[:, read:]}
        return {**options, **tokens, "past_key_values": past_key_values, "attention_mask": attention_mask}

    def _engine(self: Any, past: Any, prompts: Prompts, options: dict[str, Any], **own: Any) -> TorchEngine:
        """See `GenerationSurface._engine`."""
        resolve(self.config, True, None, None, uncached=self.uncached)
        if not is_overridden(self, TorchGeneration) and has_inner_door(self):
            return TorchEngine(self, past)
        cached = torch.from_numpy(prompts.columns[:, : prompts.past]).to(self.device)
        return TorchEngine(self, past, Preparation(self, cached, options))

    def _scorer(self: Any, **own: Any) -> TorchScorer:
        return TorchScorer(self)

    def _as_cache(self, past_key_values: Any) -> XGLMCache | None:
        return as_cache(past_key_values, self.config)

    def _from_numpy(self, array: np.ndarray, like: Any) -> torch.Tensor:
        device = self.device if like is None else like.device if isinstance(like, torch.Tensor) else "cpu"
        return torch.from_numpy(array).to(device)

    _to_numpy = staticmethod(as_numpy)
    _is_traced = staticmethod(is_traced)
    _draw_seed = staticmethod(draw_seed)
