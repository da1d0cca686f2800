"""What both model classes share: initialisation, loading, saving."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from xglm_core.checkpoint.dtypes import FloatType, float_type
from xglm_core.checkpoint.int8 import stored_types
from xglm_core.checkpoint.loading import Loading, plan_loading
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.keywords import writes
from xglm_core.resizing import check_embeddings, take_sizes
from xglm_core.surface import DUMMY_IDS, ModelSurface
from xglm_torch.fast.frozen import freeze
from xglm_torch.fast.linear import FastLinear, make_plain
from xglm_torch.int8 import become_int8, is_int8, refuse_int8
from xglm_torch.weights import (
    as_array,
    check_storable,
    execution_device,
    first_process_reads,
    load_weights,
    local_name,
    pack_weights,
    parameters_dtype,
    read_weight,
    reshard,
    weights_dtype,
    write_weight,
)

if TYPE_CHECKING:
    from xglm_torch.decoder import XGLMModel


class XGLMPreTrainedModel(ModelSurface, nn.Module):
    """Base of the model classes.

    Attributes:
        config: the architecture.
        is_split: whether each process has a part of the heads, see `xglm_torch.parallel.split_layers`.
    """

    framework = "pt"
    is_split = False

    # What accelerate, peft and transformers' Trainer look for.
    _no_split_modules = ("XGLMDecoderLayer",)
    _tied_weights_keys: ClassVar[tuple[str, ...] | None] = None
    _keys_to_ignore_on_save: ClassVar[tuple[str, ...] | None] = None
    supports_gradient_checkpointing = True

    def __init__(self, config: XGLMConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        # A key of old configurations, which is said in the file of a model that was trained so.
        self.is_gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
        self.gradient_checkpointing_kwargs: dict[str, Any] = {"use_reentrant": False}
        self.gradient_checkpointing_every, self.gradient_checkpointing_offload = 1, False
        self._input_grads: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        # `torch.ao.quantization` sets this of a model before it looks for layers, which it knows by their exact type.
        if name == "qconfig":
            make_plain(self)
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        dtype: Any = None,
        weights: str | None = None,
        quantization: str | None = None,
        device_map: Any = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        inference: bool = False,
        **options: Any,
    ) -> Self:
        """Loads a checkpoint, in inference mode (`eval()`).

        Args:
            pretrained_model_name_or_path: a folder that holds `config.json` and the weights, in any of the published
                formats; or the id of a repository of the Hugging Face Hub. None if there are `config` and `state_dict`.
            dtype: type of the parameters, by name or as a torch type; "auto" keeps the file's, None means float32.
            weights: the format to read if there are several; see `open_checkpoint`.
            quantization: "int8" makes matrices int8 while they are read; None leaves them as the file has them, so
                that one of int8 gives a model of int8. See `xglm_torch.int8`.
            device_map: the one device to move the model to, also as `{"": device}`; "auto" is the accelerator, if there
                is one, and the CPU otherwise.
            state_dict: the weights to take in place of the checkpoint's, by the names of `model.state_dict()`.
            inference: whether to freeze the model, see `freeze`.
            options: which revision of a repository, and how it is downloaded: see `HubOptions`; a whole `config`, or
                keys of the configuration whose value is to be another one; and what transformers takes: see
                `xglm_core.keywords`.

        Returns:
            The model. Its parameters are views of the mapped file where the types agree: see `load_weights`.

        Raises:
            CheckpointError: there is no checkpoint, it cannot be downloaded, or it does not fit the model.
            ConfigError: its configuration is impossible.
            InputError: an option is unknown, or not offered.
        """
        device, loading = one_device(device_map), Loading.of(options, dtype=dtype, weights=weights)
        if quantization not in (None, "int8"):
            raise InputError(f"quantization is {quantization!r}, expected 'int8' or None")
        if state_dict is not None:
            if quantization is not None:
                raise InputError("quantization and state_dict are both given; save the state_dict, then load that")
            model = cls(loading.config_of(pretrained_model_name_or_path))
            model.load_state_dict(state_dict)
            model.to(device, getattr(torch, float_type(loading.dtype or "float32").name))
            return loading.with_info(model.freeze() if inference else model.eval())
        checkpoint = loading.open(pretrained_model_name_or_path)
        plan = plan_loading(
            checkpoint, with_head=cls.has_head, dtype=loading.dtype or "float32", int8=True if quantization else None
        )
        with torch.device("meta"):
            model = cls(plan.config)
        model._follow_checkpoint(plan, str(pretrained_model_name_or_path))
        load_weights(model, plan)
        model.tie_weights()
        if device is None or device.type == "cpu":
            pack_weights(model, plan)
        model = model if device is None else model.to(device)
        return loading.with_info(model.freeze() if inference else model.eval())

    def freeze(self) -> Self:
        """Makes inference on a CPU faster, in place, and returns the model, in inference mode.

        Weights move from the mapped file into memory, in pages of 2 MB where the system has them, and each
        self-attention computes queries, keys and values by one product. Parameters, their names and values stay:
        saving, resizing, and training after `train()`, work as before. It takes a second or two for 2 GB.
        """
        freeze(self)
        return self.eval()

    @classmethod
    def _from_config(cls, config: Any, *, dtype: Any = None, **options: Any) -> Self:
        """A model with random weights; arguments as of `from_pretrained`, `config` in place of the checkpoint."""
        loading = Loading.of(options, dtype=dtype, weights=None)
        return cls(loading.configured(config)).to(getattr(torch, float_type(loading.dtype or "float32").name))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        dtype: Any = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Writes `config.json` and safetensors in the published layout; matrices of int8 with their scales.

        For a sharded model, all processes call it: weight by weight is gathered, and the first process writes.

        Args:
            save_directory: the folder, created if it is missing; an older checkpoint there is replaced once the new one
                is complete.
            max_shard_size: most bytes in one file, as a number or e.g. "500MB".
            dtype: type to store, but for matrices of int8; None keeps the parameters'.
            state_dict: the weights to write in place of the model's, whole, as `accelerator.get_state_dict` gives them.
            options: what transformers takes: see `xglm_core.keywords`. With `is_main_process=False` nothing is written;
                of a sharded model the first process writes, whatever is said.

        Raises:
            InputError: `dtype` or `max_shard_size` is unknown, or an option is unknown or not offered; or the model, or
                `state_dict`, has weights that a checkpoint has no place for, such as adapters, or none of those that it
                needs, or quantized ones.
            CheckpointError: the files cannot be written; for a sharded model, in each process.
        """
        is_writing = writes(options)
        reshard(self)
        stored = weights_dtype(self) if dtype is None else float_type(dtype)
        specs, int8 = tuple(self._specs().values()), is_int8(self)
        weights = dict(stored_types(specs, [stored for _ in specs], int8=int8))
        types = {spec.name: dtype for spec, dtype in weights.items()}
        check_storable(self, weights, state_dict)
        reading: Any = first_process_reads(self, tuple(types), lambda name: read_weight(self, name, types[name]))
        if state_dict is not None:
            reading = contextlib.nullcontext(lambda name: as_array(state_dict[local_name(self, name)], types[name]))
        with reading as read:
            if read is not None and is_writing:
                self._save(save_directory, stored, read, max_shard_size, int8=int8)

    @property
    def uncached(self) -> str:
        """Why this model keeps no cache, as it is now; "" if it does."""
        if self.is_gradient_checkpointing and self.training:
            return "gradient checkpointing"
        return "a model split among devices" if self.is_split else ""

    @property
    def decoder(self) -> XGLMModel:
        """The bare decoder: this model or its part."""
        return getattr(self, "model", self)  # type: ignore[arg-type]  # One of the two is an `XGLMModel`.

    base_model = decoder

    def get_decoder(self) -> XGLMModel:
        """The bare decoder: this model or its part."""
        return self.decoder

    def set_decoder(self, decoder: XGLMModel) -> None:
        """Puts another decoder of the same configuration in place of the part; a tied head follows.

        Raises:
            InputError: this model has no such part.
        """
        if not self.has_head:
            raise InputError("set_decoder replaces the decoder of a causal language model, and this is the decoder")
        self.model = decoder
        self.tie_weights()

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Ids that any model can read, int64 [3, 5]."""
        return {"input_ids": torch.tensor(DUMMY_IDS)}

    @property
    def device(self) -> torch.device:
        """Where the parameters are, or, of those that accelerate keeps elsewhere, where it brings them for a call."""
        return execution_device(self.get_input_embeddings()) or next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters, but for matrices of int8."""
        return parameters_dtype(self)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding. Called with ids it gives what `inputs_embeds` takes: scaled embeddings."""
        return self.decoder.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Shares the weight [vocab_size, d_model] of another embedding; a tied head follows.

        A module with a `forward` of its own takes the embedding's place: what it gives for ids are `inputs_embeds`,
        which nothing scales.

        Raises:
            InputError: there is no weight, or it has another shape; or the model is int8.
        """
        refuse_int8(self, "set_input_embeddings")
        weight: Any = getattr(new_embeddings, "weight", None)
        check_embeddings(() if weight is None else tuple(weight.shape), self.config)
        plain = type(new_embeddings).forward in (nn.Embedding.forward, nn.Linear.forward, FastLinear.forward)
        if plain or hasattr(new_embeddings, "embed_scale"):  # One of ours, or of transformers, is scaled as ours is.
            self.get_input_embeddings().weight = weight
        else:
            self.decoder.embed_tokens = new_embeddings  # type: ignore[assignment]
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None of the bare decoder."""
        return getattr(self, "lm_head", None)

    def _read_weight(self, name: str) -> tuple[np.ndarray, FloatType]:
        dtype = weights_dtype(self)
        return read_weight(self, name, dtype), dtype

    def _reshape(self, config: XGLMConfig, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """See `ModelSurface._reshape`."""
        is_pruned = config.pruned_heads != self.config.pruned_heads
        refuse_int8(self, "prune_heads" if is_pruned else "resize_token_embeddings")
        for name, value in weights:
            write_weight(self, name, value)
        take_sizes(self.config, config)
        if not is_pruned:
            self.tie_weights()
            return
        for index, layer in enumerate(self.decoder.layers):
            attention: Any = layer.self_attn
            attention.heads = config.kept_heads(index)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Has training keep no more than the input of each block, and compute the rest again in the backward pass.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False by default.
            every_n_layers: does so in the first of so many blocks; the others keep what they need.
            offload: whether the inputs wait in the memory of the host.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for model in {self, self.decoder}:
            model.is_gradient_checkpointing, model.gradient_checkpointing_kwargs = True, options
            model.gradient_checkpointing_every, model.gradient_checkpointing_offload = every_n_layers, offload

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        for model in {self, self.decoder}:
            model.is_gradient_checkpointing = False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` by its newer name."""
        self.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Gives the embeddings' output a gradient, which adapters of a frozen model need with reentrant checkpoints."""
        self.disable_input_require_grads()
        self._input_grads = self.get_input_embeddings().register_forward_hook(_with_gradient)

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        if self._input_grads is not None:
            self._input_grads.remove()
        self._input_grads = None

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; a tied head counts once.

        Args:
            only_trainable: leaves out those that need no gradient.
            exclude_embeddings: leaves out the token embedding, and with it a tied head.
        """
        table = self.get_input_embeddings().weight
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and parameter is table)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, a tied head once, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter again, if there is a head and the configuration ties them."""
        if self.has_head and self.config.tie_word_embeddings:
            table: Any = self.get_input_embeddings()
            if table.weight.dtype == torch.int8:
                become_int8(self.get_submodule("lm_head"), table.weight, table.weight_scale.clone())
            else:
                self._share(table.weight)

    def _share(self, weight: torch.Tensor) -> None:
        """Gives the head a weight, and tells it so: adapters on it ask for its sizes."""
        head: Any = self.get_output_embeddings()
        head.weight = weight
        if isinstance(head, nn.Linear):
            head.out_features, head.in_features = weight.shape

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws matrices from N(0, init_std) and zeroes biases and the padding row of the embedding.

        Does nothing on the meta device, where PyTorch would import its compiler for the draws.
        """
        if next(self.parameters()).is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and self.config.pad_token_id is not None:
                module.weight[self.config.pad_token_id].zero_()


def _with_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """A hook that gives what a module returns a gradient; no closure, so that models with it can be pickled."""
    return output.requires_grad_(True)


def one_device(device_map: Any) -> torch.device | None:
    """The device that a `device_map` stands for; None leaves a model where it was loaded.

    Raises:
        InputError: it stands for several devices, or for none.
    """
    if isinstance(device_map, dict) and [*device_map] == [""]:
        device_map = device_map[""]
    if device_map is None:
        return None
    several = "load the model first, then call accelerate's dispatch_model, or spread it by xglm_torch.parallel"
    if isinstance(device_map, dict):
        raise InputError(f"device_map names several places, expected one device; {several}")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        if torch.accelerator.device_count() > 1:
            raise InputError(f"device_map is {device_map!r}, and there are several devices; give one, or {several}")
        device_map = torch.accelerator.current_accelerator() or "cpu"
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise InputError(f"device_map is {device_map!r}, expected a device of PyTorch, such as 'cuda'") from None
