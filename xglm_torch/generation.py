"""The generation engine: it reads tokens and selects the next ones, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.generation.engine import Processor, processed
from xglm_core.generation.rules import Rules
from xglm_torch.cache import XGLMCache, empty_cache, picked, reordered
from xglm_torch.preparing import Preparation
from xglm_torch.selection import device_rules, selection

if TYPE_CHECKING:
    from xglm_torch.causal_lm import XGLMForCausalLM


class TorchEngine:
    """Implements `xglm_core.generation.engine.Engine`.

    Differs: TF and Flax have a `CompiledEngine`, for fixed shapes. Here they are free: `bucket` is 1, and the steps are
    a Python loop.

    Args:
        model: what continues the sequences.
        past: a cache to go on from, which stays as it is; None to begin.
        preparation: what decides how the model is called; None for the model's own way.
    """

    bucket = 1
    logits: torch.Tensor

    def __init__(
        self, model: XGLMForCausalLM, past: XGLMCache | None = None, preparation: Preparation | None = None
    ) -> None:
        self._model = model
        self._cache = past
        self._preparation = preparation
        self.shows_rows = preparation is not None
        self._device = model.device
        self._seen: torch.Tensor | None = None

    @torch.inference_mode()
    def prefill(self, tokens: np.ndarray, attention_mask: np.ndarray, capacity: int, seen: np.ndarray | None) -> None:
        """See `Engine.prefill`."""
        dtype = self._model.dtype
        if self._cache is None and self._preparation is None:  # Soft prompts begin where there is no cache.
            like = torch.empty(0, dtype=dtype, device=self._device)
            self._cache = empty_cache(self._model.config, len(tokens), capacity, like)
        if self._cache is not None and self._cache.batch != len(tokens):  # One row, for all of them.
            self._cache = reordered(self._cache, self._model.config, self._tensor(np.zeros(len(tokens), int)))
        mask = torch.from_numpy(attention_mask).to(self._device)
        if tokens.ndim == 3:
            embeddings = torch.from_numpy(tokens).to(self._device, dtype)
            self._read(DecoderInputs(attention_mask=mask, inputs_embeds=embeddings))
        else:
            self._read(DecoderInputs(self._tensor(tokens), mask))
        if seen is not None:
            nothing = self.logits.new_zeros(self.logits.shape, dtype=torch.bool)
            self._seen = selection.mark_seen(nothing, self._tensor(seen))

    @torch.inference_mode()
    def reorder(self, rows: np.ndarray) -> None:
        """See `Engine.reorder`."""
        places = self._tensor(rows)
        assert self._cache is not None  # After `prefill`.
        self._cache = reordered(self._cache, self._model.config, places)
        self.logits = self.logits[places]
        if self._preparation is not None:
            self._preparation.reorder(places)
        self._seen = None if self._seen is None else self._seen[places]

    @torch.inference_mode()
    def feed(self, tokens: np.ndarray) -> None:
        """See `Engine.feed`."""
        self._read(DecoderInputs(self._tensor(tokens)[:, None]))

    @torch.inference_mode()
    def select(self, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.select`."""
        on_device = device_rules(rules, self._device)
        return selection.select(self.logits, self._seen, on_device, self._tensor(keys)).numpy(force=True)

    @torch.inference_mode()
    def advance(self, tokens: np.ndarray, rules: Rules, keys: np.ndarray) -> np.ndarray:
        """See `Engine.advance`."""
        last, keys_of_steps, selected = self._tensor(tokens), self._tensor(keys), []
        on_device = device_rules(rules, self._device)
        for step in range(keys.shape[1]):
            self._read(DecoderInputs(last[:, None]))
            selected.append(selection.select(self.logits, self._seen, on_device, keys_of_steps[:, step]))
            last = selected[-1].clamp(min=0)  # A code that stands for no token.
        return torch.stack(selected, dim=1).numpy(force=True)

    @torch.inference_mode()
    def candidates(
        self, rules: Rules, totals: np.ndarray, keys: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.candidates`."""
        on_device, sums = device_rules(rules, self._device), torch.from_numpy(totals).to(self._device)
        sums, index = selection.candidates(self.logits, self._seen, on_device, sums, self._tensor(keys), count)
        return sums.numpy(force=True), index.numpy(force=True)

    # Differs: `TFEngine` and `FlaxEngine` know no inference mode, whose tensors cannot enter autograd.
    @torch.no_grad()
    def scores(self, rules: Rules) -> torch.Tensor:
        """See `Engine.scores`."""
        return selection.scores(self.recorded(), self._seen, device_rules(rules, self._device))

    @torch.no_grad()
    def recorded(self) -> torch.Tensor:
        """See `Engine.recorded`."""
        return self.logits.clone()

    def ids(self, sequences: np.ndarray) -> torch.Tensor:
        """See `Engine.ids`."""
        return self._tensor(sequences)

    @torch.no_grad()
    def cache(self, places: np.ndarray, mask: np.ndarray) -> XGLMCache | None:
        """See `Engine.cache`. Differs: only here is there a preparation, which may put positions before prompts."""
        if self._preparation is not None:
            return None
        assert self._cache is not None  # After `prefill`.
        return picked(self._cache, self._tensor(places), torch.from_numpy(mask).to(self._device))

    @torch.no_grad()
    def process(self, processors: Sequence[Processor], sequences: np.ndarray) -> None:
        """See `Engine.process`."""
        self.logits = processed(processors, self.ids(sequences), self.recorded())  # Which a hook may write into.

    def _read(self, inputs: DecoderInputs) -> None:
        """Runs the model; afterwards `logits` are those of the last token of each row."""
        if self._seen is not None:  # After `prefill`, which has read the prompts.
            self._seen = self._seen.scatter(1, inputs.input_ids, True)
        if self._preparation is None:
            outputs = self._model(inputs, self._cache, Wanted(cache=True))
        else:
            given = inputs.attention_mask, inputs.input_ids, inputs.inputs_embeds
            arguments = self._preparation.arguments(self._cache, *given)
            outputs = self._model(**(arguments | {"use_cache": True, "logits_to_keep": 1, "return_dict": True}))
        self._cache = outputs.past_key_values
        self.logits = outputs.logits[:, 0]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """Integers on the model's device."""
        return torch.from_numpy(array.astype(np.int64)).to(self._device)


def draw_seed() -> int:
    """A seed from PyTorch's own generator of the CPU, so that `torch.manual_seed` makes a call repeatable.

    Differs: JAX has no generator of its own, so Flax draws a seed as the core does.
    """
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
