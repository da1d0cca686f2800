"""What both model classes share: initialisation, loading, saving."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar, Self

import keras
import tensorflow as tf

from xglm_core.checkpoint.dtypes import float_type
from xglm_core.checkpoint.folder import open_checkpoint, save_checkpoint
from xglm_core.checkpoint.loading import LoadPlan, plan_loading
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import EMBEDDING, weight_specs
from xglm_tf.weights import Initializer, load_weights, read_weight, set_initializer, weights_dtype


class TFXGLMPreTrainedModel(keras.Model):
    """Base of the model classes.

    Attributes:
        config: the architecture.
    """

    has_head: ClassVar[bool]

    def __init__(self, config: XGLMConfig, *, dtype: Any = "float32") -> None:
        super().__init__(dtype=dtype)
        self.config = config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `call`, see there."""
        try:
            return super().__call__(*args, **kwargs)
        except InputError as error:
            # Keras buries the message in a listing of the arguments. Ours says all in one line.
            ours = error.__context__ if isinstance(error.__context__, InputError) else error
            raise ours from None

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, dtype: Any = "float32", weights: str | None = None
    ) -> Self:
        """Loads a checkpoint folder.

        Args:
            folder: holds `config.json` and the weights, in any of the published formats.
            dtype: type of the parameters, by name or as a TensorFlow type; "auto" keeps the file's.
            weights: the format to read if there are several; see `open_checkpoint`.

        Returns:
            The model.

        Raises:
            CheckpointError: the folder holds no checkpoint, or it does not fit the model.
            ConfigError: its configuration is impossible.
        """
        plan = plan_loading(open_checkpoint(folder, weights), with_head=cls.has_head, dtype=dtype)
        return cls(plan.config, dtype=plan.dtype.name, plan=plan)  # type: ignore[call-arg]  # Its subclasses have it.

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
        by_name = {spec.name: spec for spec in specs}
        save_checkpoint(
            folder, self.config, specs, stored, lambda name: read_weight(self, by_name[name], stored), max_shard_size
        )

    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(math.prod(weight.shape) for weight in self.weights)

    def create_weights(self, plan: LoadPlan | None) -> None:
        """Creates the variables with their first values: those of a checkpoint, or random ones."""
        if plan is None:
            self.init_weights()
            self.build()
        else:
            load_weights(self, plan)

    def init_weights(self) -> None:
        """Has matrices drawn from N(0, init_std); biases and the padding row of the embedding are zero.

        Differs: Keras gives variables their values when it creates them, by the initializers of their layers.
        """
        for spec in weight_specs(self.config, with_head=self.has_head and not self.config.tie_word_embeddings):
            if len(spec.shape) == 2:
                normal = keras.initializers.RandomNormal(stddev=self.config.init_std)
                set_initializer(self, spec, self._without_padding(normal) if spec.name == EMBEDDING else normal)

    def _without_padding(self, initializer: Initializer) -> Initializer:
        """An initializer whose row `pad_token_id`, if the vocabulary has one, is zero."""
        rows = tf.range(self.config.vocab_size)[:, None]
        return lambda shape, dtype: tf.where(rows == self.config.pad_token_id, 0, initializer(shape, dtype))
