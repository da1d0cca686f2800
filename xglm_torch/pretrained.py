"""What both model classes share: initialisation, loading, saving."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

import torch
from torch import nn

from xglm_core.checkpoint.dtypes import float_type
from xglm_core.checkpoint.folder import open_checkpoint, save_checkpoint
from xglm_core.checkpoint.loading import plan_loading
from xglm_core.config import XGLMConfig
from xglm_core.weight_names import weight_specs
from xglm_torch.weights import load_weights, read_weight, weights_dtype


class XGLMPreTrainedModel(nn.Module):
    """Base of the model classes.

    Attributes:
        config: the architecture.
    """

    has_head: ClassVar[bool]

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, dtype: Any = "float32") -> Self:
        """Loads a checkpoint folder, in inference mode (`eval()`).

        Args:
            folder: holds `config.json` and the weights.
            dtype: type of the parameters, by name or as a torch type; "auto" keeps the file's.

        Returns:
            The model. Its parameters are views of the mapped file where the types agree: see `load_weights`.

        Raises:
            CheckpointError: the folder holds no checkpoint, or it does not fit the model.
            ConfigError: its configuration is impossible.
        """
        plan = plan_loading(open_checkpoint(folder), with_head=cls.has_head, dtype=dtype)
        with torch.device("meta"):
            model = cls(plan.config)
        load_weights(model, plan)
        model.tie_weights()
        return model.eval()

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", dtype: Any = None
    ) -> None:
        """Writes `config.json` and safetensors in the published layout.

        Args:
            folder: created if it is missing; an older checkpoint there is replaced once the new one is complete.
            max_shard_size: most bytes in one file, as a number or e.g. "500MB".
            dtype: type to store; None keeps the parameters'.

        Raises:
            InputError: `dtype` or `max_shard_size` is unknown.
        """
        stored = weights_dtype(self) if dtype is None else float_type(dtype)
        specs = weight_specs(self.config, with_head=self.has_head and not self.config.tie_word_embeddings)
        save_checkpoint(
            folder, self.config, specs, stored, lambda name: read_weight(self, name, stored), max_shard_size
        )

    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def tie_weights(self) -> None:
        """Does nothing: the bare decoder has no head."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws matrices from N(0, init_std) and zeroes biases and the padding row of the embedding."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
