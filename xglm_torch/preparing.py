"""Generation by a `prepare_inputs_for_generation` that is not the model's own, such as that of peft's soft prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from xglm_core.errors import InputError
from xglm_torch.cache import XGLMCache

if TYPE_CHECKING:
    from xglm_torch.causal_lm import XGLMForCausalLM

# What such a method may be told besides, and may pass on. The cache says as much.
_STEP = ("cache_position", "next_sequence_length", "is_first_iteration")
_GIVEN = ("input_ids", "past_key_values", "attention_mask", "inputs_embeds", "use_cache", *_STEP)


class Preparation:
    """Asks the method at each step which arguments to call the model with, as `generate` of transformers does.

    Args:
        model: whose method it is.
        cached: the ids that a given cache holds, integers [rows, past].
        options: options of the call. Those that the method names are removed, and given to it.
    """

    def __init__(self, model: XGLMForCausalLM, cached: torch.Tensor, options: dict[str, Any]) -> None:
        self._model = model
        self._ids = cached
        self._options: dict[str, Any] = {}
        self._rows: dict[str, torch.Tensor] = {}  # What has a row for each sequence.
        named = inspect.signature(model.prepare_inputs_for_generation).parameters
        for name in [name for name in options if name in named and name not in _GIVEN]:
            value = options.pop(name)
            has_rows = isinstance(value, torch.Tensor) and value.shape[:1] == cached.shape[:1]
            (self._rows if has_rows else self._options)[name] = value

    def reorder(self, rows: torch.Tensor) -> None:
        """Continues with these of the present rows."""
        self._ids = self._ids[rows]
        self._rows = {name: value[rows.to(value.device)] for name, value in self._rows.items()}

    def arguments(
        self,
        cache: XGLMCache | None,
        attention_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments of the model's next call.

        Args:
            cache: of what was read, or None.
            attention_mask: 1 for tokens, 0 for padding, of all positions; None if tokens follow those of before.
            input_ids, inputs_embeds: what is to be read now.

        Raises:
            InputError: the method gives no dictionary, or names what the model's call does not take.
        """
        begins = attention_mask is not None
        if input_ids is not None:
            self._ids = torch.cat([self._ids, input_ids], dim=1)
        if inputs_embeds is not None:
            self._rows["inputs_embeds"] = inputs_embeds
        if attention_mask is None:
            before = self._rows["attention_mask"]
            attention_mask = torch.cat([before, torch.ones_like(before[:, :1])], dim=1)
        self._rows["attention_mask"] = attention_mask
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        new, end = given.shape[1], attention_mask.shape[1]
        steps = (
            torch.arange(end - new, end, device=attention_mask.device),
            None if begins and cache is None else new,
            begins,
        )
        method = self._model.prepare_inputs_for_generation
        named = inspect.signature(method).parameters
        told: dict[str, Any] = {name: value for name, value in zip(_STEP, steps, strict=True) if name in named}
        found = method(self._ids, past_key_values=cache, use_cache=True, **told, **self._rows, **self._options)
        if not isinstance(found, Mapping):
            raise InputError(
                f"prepare_inputs_for_generation gives a {type(found).__name__}, expected a dictionary of the "
                "arguments of the model's call"
            )
        known = inspect.signature(self._model.forward).parameters
        wanted = {name: value for name, value in found.items() if name not in _STEP and value is not None}
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        for name in wanted:
            if name not in known and not takes_any:
                raise InputError(
                    f"prepare_inputs_for_generation gives {name}, which the model's call does not take; expected some "
                    f"of {', '.join(known)}"
                )
        return wanted
