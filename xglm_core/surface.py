"""What all model classes offer to scripts and libraries beside the computation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Never, Self

import numpy as np

from xglm_core.checkpoint.dtypes import FloatType
from xglm_core.checkpoint.loading import LoadPlan
from xglm_core.checkpoint.writing import save_checkpoint
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.keywords import UPLOAD
from xglm_core.resizing import pruned_config, pruned_weights, resized_config, resized_rows
from xglm_core.weight_names import EMBEDDING, HEAD, WeightSpec, weight_specs

# Example ids for any vocabulary of at least eight tokens; exporters and tracers of transformers ask for them.
DUMMY_IDS = ((7, 6, 0, 0, 1), (1, 2, 3, 0, 0), (0, 0, 0, 4, 5))


class ModelSurface:
    """The first base of the model classes. Backends implement the methods that raise `NotImplementedError`.

    Attributes:
        config: the architecture.
        generation_config: the default options of `generate`; only where there is a head.
        name_or_path: the argument of `from_pretrained`; empty for a new model.
    """

    config: XGLMConfig
    generation_config: GenerationConfig
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

    def get_input_embeddings(self) -> Any:
        """The token embedding."""
        raise NotImplementedError

    def get_output_embeddings(self) -> Any:
        """The head; None, as the bare decoder has none."""
        return None

    def tie_weights(self) -> None:
        """Does nothing: the bare decoder has no head."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = False
    ) -> Any:
        """Changes the vocabulary: old rows are kept, new ones are drawn from N(0, init_std), a tied head stays tied.

        Parameters of another shape are other parameters: make the optimizer afterwards.

        Args:
            new_num_tokens: rows wanted; None keeps their number.
            pad_to_multiple_of: round the number up to a multiple of this. The further rows stand for no token, so they
                are never generated; `config.padding_rows` is their number.
            mean_resizing: draw new rows closely around the mean of the old ones instead.

        Returns:
            The input embeddings; `config.vocab_size` is their number.

        Raises:
            InputError: a number is not a positive integer; or, in PyTorch, the model is int8; or, in JAX, there are no
                parameters.
            ConfigError: `config.pad_token_id` would be outside the vocabulary.
        """
        config = resized_config(self.config, new_num_tokens, pad_to_multiple_of)
        names = [name for name in (EMBEDDING, HEAD) if name in self._specs()]
        self._reshape(config, ((name, resized_rows(*self._read_weight(name), config, mean_resizing)) for name in names))
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Removes self-attention heads for good; the model computes what it would with these heads masked.

        Args:
            heads_to_prune: heads by the index of their block, numbered as in the unpruned model, as they are in a
                `head_mask` afterwards, too. `config.pruned_heads` remembers them.

        Raises:
            ConfigError: there is no such block or head, or a block would have none left; or, in JAX, the blocks would
                differ in shape, which `scan_layers` does not allow.
            InputError: in PyTorch, the model is int8; in Keras, there are adapters, which would be lost, or the model
                is quantized; in JAX, there are no parameters.
        """
        config = pruned_config(self.config, heads_to_prune)
        self._reshape(config, pruned_weights(self.config, config, lambda name: self._read_weight(name)[0]))

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

    def _specs(self) -> dict[str, WeightSpec]:
        """The weights by canonical name."""
        with_head = self.has_head and not self.config.tie_word_embeddings
        specs = weight_specs(self.config, with_head=with_head, bare=not self.has_head)
        return {spec.name: spec for spec in specs}

    def _read_weight(self, name: str) -> tuple[np.ndarray, FloatType]:
        """A weight by canonical name, in canonical shape, and its type."""
        raise NotImplementedError

    def _reshape(self, config: XGLMConfig, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """Replaces weights by those of other shapes, and takes over the sizes of a configuration (`take_sizes`).

        Args:
            config: the new configuration; that of the model is as before until all weights are read.
            weights: canonical names, and values in canonical shape and the type of the old ones. They are read from the
                model one by one.
        """
        raise NotImplementedError

    def _follow_checkpoint(self, plan: LoadPlan, source: str | os.PathLike[str]) -> None:
        """Takes over what a checkpoint has besides weights and architecture."""
        self.name_or_path = str(source)
        if self.has_head:
            self.generation_config = plan.generation

    def _save(
        self,
        folder: str | os.PathLike[str],
        dtype: FloatType,
        read: Callable[[str], np.ndarray],
        max_shard_size: int | str,
        *,
        int8: bool = False,
    ) -> None:
        """Writes weights, as `read` gives them by canonical name, and configurations; see `save_checkpoint`."""
        save_checkpoint(folder, self.config, tuple(self._specs().values()), dtype, read, max_shard_size, int8=int8)
        if self.has_head:
            self.generation_config.save_pretrained(folder)
