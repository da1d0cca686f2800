"""What all model classes offer to scripts and libraries, and that is no tensor program."""

from __future__ import annotations

from typing import Any, ClassVar, Never, Self

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.keywords import UPLOAD

# Ids of any model whose vocabulary has eight tokens: what exporters and tracers of transformers ask for.
DUMMY_IDS = ((7, 6, 0, 0, 1), (1, 2, 3, 0, 0), (0, 0, 0, 4, 5))


class ModelSurface:
    """The first base of the model classes.

    Attributes:
        config: the architecture.
        name_or_path: what `from_pretrained` was given; empty for a model that was made.
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
        """Whether there is `generate`: the bare decoder has none."""
        return cls.has_head

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Self:
        """A model with random weights, of what `XGLMConfig.of` takes and the constructor's options."""
        return cls(XGLMConfig.of(config), **options)  # type: ignore[call-arg]  # The constructor of a backend's class.

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, in tokens."""
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
