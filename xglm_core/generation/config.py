"""`GenerationConfig`: the options of `generate`."""

from __future__ import annotations

from dataclasses import dataclass

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a text.

    Attributes:
        max_new_tokens: most tokens to add to each row.
        eos_token_id: ids that end a row; empty to go on to `max_new_tokens`.
        pad_token_id: id that fills a row after its end.

    Raises:
        InputError: `max_new_tokens` is not a positive integer.
    """

    max_new_tokens: int = 20
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"max_new_tokens is {count!r}, expected a positive integer")

    @classmethod
    def from_model(cls, config: XGLMConfig, *, max_new_tokens: int = 20, stop_at_eos: bool = True) -> GenerationConfig:
        """The options for a model: its special ids, and what the caller asks for."""
        eos = config.eos_token_ids
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), 0)
        return cls(max_new_tokens, eos if stop_at_eos else (), pad)
