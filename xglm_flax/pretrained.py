"""What both model classes share: initialisation, loading, saving, and calling the compiled module."""

from __future__ import annotations

import functools
import os
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from xglm_core.checkpoint.dtypes import float_type
from xglm_core.checkpoint.folder import open_checkpoint, save_checkpoint
from xglm_core.checkpoint.loading import plan_loading
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import weight_specs
from xglm_flax.cache import FlaxXGLMCache, empty_cache
from xglm_flax.weights import Params, load_weights, read_weight, weights_dtype


class FlaxXGLMPreTrainedModel:
    """Base of the model classes. Differs: they are no modules, but hold one and, apart from it, its parameters.

    Args:
        config: the architecture.
        input_shape: batch and length of the input that initialisation traces; the parameters do not depend on it.
        seed: of the random parameters.
        dtype: type of the computation, by name or as a JAX type.
        _do_init: whether to draw parameters; if not, `params` is None and every call has to pass some.
        param_dtype: type of the parameters that are drawn, by name or as a JAX type.

    Attributes:
        config: the architecture.
        dtype: type of the computation.
        module: the Linen module.
        params: its parameters, or None.
    """

    has_head: ClassVar[bool]
    module_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        config: XGLMConfig,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(float_type(dtype).name)
        self.module = self.module_class(config, self.dtype, jnp.dtype(float_type(param_dtype).name))
        self.params = self.init_weights(jax.random.key(seed), input_shape) if _do_init else None
        # Compiled once for each combination of shapes and static arguments.
        self._apply = jax.jit(
            functools.partial(_apply, self.module),
            static_argnames=("use_cache", "output_hidden_states", "train", "logits_to_keep"),
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: Any = "float32",
        param_dtype: Any = None,
        weights: str | None = None,
    ) -> Self:
        """Loads a checkpoint folder.

        Args:
            folder: holds `config.json` and the weights, in any of the published formats.
            dtype: type of the computation, by name or as a JAX type.
            param_dtype: type of the parameters; None means float32, "auto" keeps the file's.
            weights: the format to read if there are several; see `open_checkpoint`.

        Returns:
            The model.

        Raises:
            CheckpointError: the folder holds no checkpoint, or it does not fit the model.
            ConfigError: its configuration is impossible.
            InputError: a type is unknown.
        """
        wanted = "float32" if param_dtype is None else param_dtype
        plan = plan_loading(open_checkpoint(folder, weights), with_head=cls.has_head, dtype=wanted)
        model = cls(plan.config, dtype=dtype, _do_init=False, param_dtype=plan.dtype.name)
        model.params = load_weights(plan, bare=not cls.has_head)
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        params: Params | None = None,
        max_shard_size: int | str = "5GB",
        dtype: Any = None,
    ) -> None:
        """Writes `config.json` and safetensors in the published layout.

        Args:
            folder: created if it is missing; an older checkpoint there is replaced once the new one is complete.
            params: the parameters to write; None means the model's.
            max_shard_size: most bytes in one file, as a number or e.g. "500MB".
            dtype: type to store; None keeps the parameters'.

        Raises:
            InputError: `dtype` or `max_shard_size` is unknown, or there are no parameters.
        """
        params = self._params_or_own(params)
        stored = weights_dtype(params) if dtype is None else float_type(dtype)
        specs = weight_specs(self.config, with_head=self.has_head and not self.config.tie_word_embeddings)
        by_name = {spec.name: spec for spec in specs}
        save_checkpoint(
            folder, self.config, specs, stored, lambda name: read_weight(params, by_name[name], stored), max_shard_size
        )

    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._params_or_own(None)))

    def init_cache(self, batch_size: int, max_length: int) -> FlaxXGLMCache:
        """An empty cache with room for `max_length` tokens in each row; it does not grow, so no shape ever changes."""
        return empty_cache(self.config, batch_size, max_length, self.dtype, fixed=True)

    def init_weights(self, rng: jax.Array, input_shape: tuple[int, int] = (1, 1)) -> Params:
        """Draws matrices from N(0, init_std); biases and the padding row of the embedding are zero.

        Args:
            rng: a key of `jax.random`.
            input_shape: batch and length of the input that is traced.

        Returns:
            The parameters; those of the model are left alone.
        """
        variables: Any = self.module.init(rng, jnp.zeros(input_shape, jnp.int32))
        return variables["params"]

    def _params_or_own(self, params: Params | None) -> Params:
        """`params`, or the model's own if it is None.

        Raises:
            InputError: the model has none either.
        """
        params = self.params if params is None else params
        if params is None:
            raise InputError("params is None, and the model was made with _do_init=False; pass params or set .params")
        return params


def _apply(
    module: nn.Module,
    params: Params,
    *inputs: Any,
    dropout_rng: jax.Array | None,
    train: bool,
    **options: Any,
) -> Any:
    """What a model call compiles. Differs: dropout needs a key, which PyTorch and Keras keep behind the scenes."""
    config: XGLMConfig = module.config
    if train and dropout_rng is None and any((config.dropout, config.attention_dropout, config.activation_dropout)):
        raise InputError("train is True but dropout_rng is None, expected a key: dropout_rng=jax.random.key(0)")
    rngs = {"dropout": dropout_rng} if train and dropout_rng is not None else {}
    return module.apply({"params": params}, *inputs, deterministic=not rngs, rngs=rngs, **options)
