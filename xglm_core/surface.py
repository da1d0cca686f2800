"""What all model classes offer to scripts and libraries beside the computation."""

from __future__ import annotations

from typing import Any, ClassVar, Never, Self

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.keywords import UPLOAD

# Example ids for any vocabulary of at least eight tokens; exporters and tracers of transformers ask for them.
DUMMY_IDS = ((7, 6, 0, 0, 1), (1, 2, 3, 0, 0), (0, 0, 0, 4, 5))


class ModelSurface:
    """The first base of the model classes.

    Attributes:
        config: the architecture.
        name_or_path: the argument of `from_pretrained`; empty for a new model.
    """

    config: XGLMConfig
    has_head: ClassVar[bool]
    framework: ClassVar[str]  # As transformers calls it.

    config_class = XGLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    name_or_path = ""

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`; the bare decoder has not."""
        return cls.has_head

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Self:
        """A model with random weights, for a configuration as of `XGLMConfig.of` and options of the constructor."""
        return cls(XGLMConfig.of(config), **options)  # type: ignore[call-arg]  # The constructor of a backend's class.

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding."""
        return self.config.vocab_size

    def push_to_hub(self, *args: Any, **options: Any) -> Never:
        """Is not offered.

        Raises:
            InputError: says what to do instead.
        """
        raise InputError(f"push_to_hub is not offered here; {UPLOAD}")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> Never:
        """Is not offered.

        Raises:
            InputError: says what to do instead.
        """
        raise InputError("register_for_auto_class is not offered here; import the class by its name")
