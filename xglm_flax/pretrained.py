"""What both model classes share: initialisation, loading, saving, and calling the compiled module."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import unflatten_dict

from xglm_core.calls import DecoderInputs, Wanted
from xglm_core.checkpoint.dtypes import FloatType, float_type
from xglm_core.checkpoint.loading import Loading, plan_loading
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.keywords import writes
from xglm_core.resizing import check_embeddings, take_sizes
from xglm_core.surface import DUMMY_IDS, ModelSurface
from xglm_core.weight_names import EMBEDDING
from xglm_flax.cache import FlaxXGLMCache, as_cache, empty_cache, is_traced
from xglm_flax.inputs import check_dropout, checked_inputs
from xglm_flax.remat import Remat, remat_policy
from xglm_flax.stacking import check_stackable, stack_layers, unstack_layers
from xglm_flax.weights import (
    Params,
    cast,
    checked_params,
    first_process_reads,
    get_parameter,
    initial_params,
    load_weights,
    param_shapes,
    read_weight,
    set_parameter,
    weights_dtype,
    write_weight,
)


class FlaxXGLMPreTrainedModel(ModelSurface):
    """Base of the model classes. Differs: in PyTorch and Keras they are modules; here they hold one.

    Args:
        config: the architecture.
        input_shape: kept, but without effect, as the parameters do not depend on it.
        seed: of the random parameters.
        dtype: type of the computation, by name or as a JAX type.
        _do_init: whether to draw parameters; if not, `params` is None and every call has to pass some.
        param_dtype: type of the parameters that are drawn, by name or as a JAX type.
        scan_layers: whether the blocks run in a `jax.lax.scan`, which compiles about as fast as one block. The
            parameters are those of any other model, or what `stack_layers` makes of them, which spares each call the
            stacking.
        remat: what the backward pass computes again to need less memory: "none", "dots" (attention), "full" (whole
            blocks), or a policy of `jax.checkpoint_policies`.

    Attributes:
        config: the architecture. The defaults of calls (`output_attentions`, `use_cache`, ...) may be changed here.
        dtype: type of the computation.
        module: the Linen module; another one after a change of the architecture.
        key: of the parameters that were drawn.
        input_shape: as given.
    """

    framework = "flax"
    module_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        config: XGLMConfig,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        param_dtype: Any = jnp.float32,
        scan_layers: bool = False,
        remat: Remat = "none",
    ) -> None:
        self.config = config
        self.input_shape = input_shape
        self.key = jax.random.key(seed)
        self.dtype = jnp.dtype(float_type(dtype).name)
        self.param_dtype = jnp.dtype(float_type(param_dtype).name)
        self.scan_layers = scan_layers
        remat_policy(remat)
        self.remat = remat
        self._make_module()
        self._params = self.init_weights(self.key, input_shape) if _do_init else None

    def _make_module(self) -> None:
        """Makes the module and its compiled functions for the present configuration.

        The module has a copy, as compiled code must not depend on what may change.
        """
        self.config.validate()
        if self.scan_layers:
            check_stackable(self.config)
        self.module = self.module_class(
            copy.copy(self.config), self.dtype, self.param_dtype, scan_layers=self.scan_layers, remat=self.remat
        )
        # Compiled once for each combination of shapes and static arguments.
        self._apply = jax.jit(functools.partial(_apply, self.module), static_argnums=5)

    @property
    def params(self) -> Params | None:
        """The parameters, a tree of dictionaries; None if there are none yet.

        Another tree may be put here, with blocks one by one or stacked, frozen or not; or shapes in place of arrays.

        Raises:
            InputError: on setting: parameters are missing, unexpected or of another shape.
        """
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = None if params is None else self._checked(params)

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The path of each parameter, as `flax.traverse_util.flatten_dict` has it."""
        return set(param_shapes(self._specs().values()))

    @property
    def params_shape_tree(self) -> Params:
        """A `jax.ShapeDtypeStruct` for each parameter, of type `param_dtype`."""
        shapes = param_shapes(self._specs().values())
        tree: Params = unflatten_dict({path: jax.ShapeDtypeStruct(shapes[path], self.param_dtype) for path in shapes})
        return tree

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, dtype: Any = ..., *, _do_init: Literal[False], **options: Any
    ) -> tuple[Self, Params]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, dtype: Any = ..., *, _do_init: Literal[True] = True, **options: Any
    ) -> Self: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: Any = None,
        *,
        _do_init: bool = True,
        param_dtype: Any = None,
        scan_layers: bool = False,
        remat: Remat = "none",
        weights: str | None = None,
        **options: Any,
    ) -> Self | tuple[Self, Params]:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder that holds `config.json` and the weights, in any of the published
                formats; or the id of a repository of the Hugging Face Hub.
            dtype: type of the computation, by name or as a JAX type; None means float32.
            _do_init: whether the model holds the parameters. If not, they are returned beside it, in the memory of the
                host, to be spread over devices.
            param_dtype: type of the parameters; None means float32, "auto" keeps the file's.
            scan_layers, remat: see the class.
            weights: the format to read if there are several; see `open_checkpoint`.
            options: which revision of a repository, and how it is downloaded: see `HubOptions`; a whole `config`, or
                keys of the configuration whose value is to be another one; and what transformers takes: see
                `xglm_core.keywords`.

        Returns:
            The model; without `_do_init` the model and its parameters.

        Raises:
            CheckpointError: there is no checkpoint, it cannot be downloaded, or it does not fit the model.
            ConfigError: its configuration is impossible.
            InputError: a type or an option is unknown, or not offered.
        """
        loading = Loading.of(options, dtype=dtype, weights=weights)
        wanted = "float32" if param_dtype is None else param_dtype
        checkpoint = loading.open(pretrained_model_name_or_path)
        plan = plan_loading(checkpoint, with_head=cls.has_head, dtype=wanted, int8=False)
        model = cls(
            plan.config,
            dtype=loading.dtype or "float32",
            _do_init=False,
            param_dtype=plan.dtype.name,
            scan_layers=scan_layers,
            remat=remat,
        )
        model._follow_checkpoint(plan, pretrained_model_name_or_path)
        if not _do_init:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                return model, load_weights(model._specs().values(), plan)
        model._params = load_weights(model._specs().values(), plan)
        return loading.with_info(model)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        params: Params | None = None,
        max_shard_size: int | str = "5GB",
        dtype: Any = None,
        **options: Any,
    ) -> None:
        """Writes `config.json` and safetensors in the published layout.

        If parameters lie in several processes, all of them call it: weight by weight is gathered, and the first process
        writes.

        Args:
            save_directory: the folder, created if it is missing; an older checkpoint there is replaced once the new one
                is complete.
            params: the parameters to write; None means the model's.
            max_shard_size: most bytes in one file, as a number or e.g. "500MB".
            dtype: type to store; None keeps the parameters'.
            options: what transformers takes: see `xglm_core.keywords`. With `is_main_process=False` nothing is written.

        Raises:
            InputError: `dtype` or `max_shard_size` is unknown, or there are no parameters, or those of another model;
                or an option is unknown or not offered.
            CheckpointError: the files cannot be written; with several processes, in each.
        """
        is_writing = writes(options)
        params = self._params_or_own(params)
        stored = weights_dtype(params) if dtype is None else float_type(dtype)
        specs = self._specs()
        with first_process_reads(params, tuple(specs), lambda name: read_weight(params, specs[name], stored)) as read:
            if read is not None and is_writing:
                self._save(save_directory, stored, read, max_shard_size)

    def get_input_embeddings(self) -> jax.Array:
        """The token embedding [vocab_size, d_model]. Differs: an array; in PyTorch and Keras it is a layer."""
        return get_parameter(self._params_or_own(None), self._specs()[EMBEDDING])

    def set_input_embeddings(self, new_embeddings: jax.Array) -> None:
        """Replaces the token embedding [vocab_size, d_model]; a tied head follows.

        Raises:
            InputError: it has another shape, or there are no parameters.
        """
        self._set_matrix(EMBEDDING, new_embeddings)

    def _read_weight(self, name: str) -> tuple[np.ndarray, FloatType]:
        params, spec = self._params_or_own(None), self._specs()[name]
        return read_weight(params, spec), weights_dtype(params, spec)

    def _reshape(self, config: XGLMConfig, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """See `ModelSurface._reshape`."""
        own, specs = self._params_or_own(None), self._specs()
        if self.scan_layers:
            check_stackable(config)
        params = unstacked = own if config.pruned_heads == self.config.pruned_heads else unstack_layers(own)
        for name, value in weights:
            params = write_weight(params, specs[name], value, weights_dtype(params, specs[name]))
        take_sizes(self.config, config)
        self._make_module()
        self.params = params if unstacked is own else stack_layers(params)

    def to_bf16(self, params: Params, mask: Any = None) -> Params:
        """A tree with parameters in bfloat16.

        Args:
            params: the parameters, which are left alone.
            mask: booleans in a tree of the same structure: which of them to cast; None means all.
        """
        return cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Any = None) -> Params:
        """As `to_bf16`, in float16."""
        return cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Any = None) -> Params:
        """As `to_bf16`, in float32."""
        return cast(params, jnp.float32, mask)

    def enable_gradient_checkpointing(self) -> None:
        """Has training keep no more than the input of each block: `remat="full"`, set after the model was made."""
        self.remat = "full"
        self._make_module()

    def init_cache(self, batch_size: int, max_length: int) -> FlaxXGLMCache:
        """An empty cache with room for `max_length` tokens in each row; it does not grow, so no shape ever changes.

        The part for encoder states is filled by the first call that gives some.
        """
        return empty_cache(self.config, batch_size, max_length, self.dtype, fixed=True)

    @property
    def dummy_inputs(self) -> dict[str, jax.Array]:
        """Ids that any model can read, int32 [3, 5]."""
        return {"input_ids": jnp.array(DUMMY_IDS, jnp.int32)}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; a tied head counts once. Differs: PyTorch knows which are trained; here it is all."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self._params_or_own(None)))
        return count - self.get_input_embeddings().size if exclude_embeddings else count

    def get_memory_footprint(self) -> int:
        """Bytes of the parameters, a tied head once."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._params_or_own(None)))

    def init_weights(
        self, rng: jax.Array, input_shape: tuple[int, int] = (1, 1), params: Params | None = None
    ) -> Params:
        """Draws matrices from N(0, init_std); biases and the padding row of the embedding are zero.

        Args:
            rng: a key of `jax.random`.
            input_shape: has no effect.
            params: parameters to keep; only those that are missing are drawn.

        Returns:
            The parameters; those of the model, and `params`, are left alone.
        """
        specs = tuple(self._specs().values())
        given = unstack_layers(unfreeze(params)) if params else {}
        return initial_params(self.config, specs, rng, self.param_dtype, given)

    def _set_matrix(self, name: str, matrix: Any) -> None:
        """Replaces the embedding, or the head's matrix [vocab_size, d_model], by canonical name."""
        check_embeddings(np.shape(matrix), self.config)
        params, spec = self._params_or_own(None), self._specs()[name]
        new = jnp.asarray(matrix, self.get_input_embeddings().dtype)
        self.params = set_parameter(params, spec.flax, new.T if spec.transposed else new)

    def _checked_call(
        self, inputs: DecoderInputs, past_key_values: Any, params: Params | None, train: bool, key: jax.Array | None
    ) -> tuple[Params, DecoderInputs, FlaxXGLMCache | None, jax.Array | None]:
        """What a call is to run, once it is certain that it can: parameters, inputs, a cache with room, and a key.

        Args:
            inputs, past_key_values, params, train: see `FlaxXGLMModel.__call__`.
            key: its `dropout_rng`.
        """
        params = self._params_or_own(params, checked=False)
        inputs, cache = checked_inputs(self.config, inputs, as_cache(past_key_values, self.config, self.dtype))
        check_dropout(self.config, train, key)
        return params, inputs, cache, key if train else None

    def _results(
        self,
        params: Params,
        inputs: DecoderInputs,
        cache: FlaxXGLMCache | None,
        key: jax.Array | None,
        *,
        wanted: Wanted,
        **arguments: Any,
    ) -> dict[str, Any]:
        """What the module computes of a call, in compiled code.

        Args:
            params, inputs, cache, key: of `_checked_call`.
            wanted: what to return.
            arguments: what else the module's `results` takes. Arrays are traced; the rest is part of what is compiled.
        """
        traced = {name: value for name, value in arguments.items() if hasattr(value, "shape")}
        static = {"wanted": wanted} | {name: value for name, value in arguments.items() if name not in traced}
        try:
            results: dict[str, Any] = self._apply(params, inputs, cache, key, traced, tuple(static.items()))
        except Exception:
            # Parameters are checked only now, as that takes some time.
            try:
                self._checked(params)
            except InputError as misfit:
                raise misfit from None
            raise
        if cache is not None and wanted.attentions and not is_traced(cache.length):
            keys = int(cache.length) + results["attentions"][0].shape[2]
            results["attentions"] = tuple(layer[..., :keys] for layer in results["attentions"])
        return results

    def _params_or_own(self, params: Any, *, checked: bool = True) -> Params:
        """`params`, or the model's own if it is None.

        Raises:
            InputError: the model has none either; or those given are of another model, unless that is not `checked`.
        """
        if params is None:
            params, checked = self.params, False
        if params is None:
            raise InputError("params is None, and the model was made with _do_init=False; pass params or set .params")
        tree: Params = self._checked(params) if checked else params
        return tree

    def _checked(self, params: Any) -> Params:
        return checked_params(params, self._specs().values())


def _apply(
    module: nn.Module,
    params: Params,
    inputs: DecoderInputs,
    cache: FlaxXGLMCache | None,
    key: jax.Array | None,
    traced: dict[str, Any],
    static: tuple[tuple[str, Any], ...],
) -> Any:
    """What a call compiles."""
    rngs = {} if key is None else {"dropout": key}
    return module.apply({"params": params}, inputs, cache, method="results", rngs=rngs, **traced, **dict(static))
