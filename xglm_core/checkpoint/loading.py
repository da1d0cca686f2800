"""How a checkpoint is loaded into a model: which weights, in which type, with which head."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from xglm_core.checkpoint.dtypes import DTYPES, FLOAT32, INT8, FloatType, float_type
from xglm_core.checkpoint.folder import Checkpoint, open_checkpoint
from xglm_core.checkpoint.int8 import SCALE, converted_by_rows, with_method
from xglm_core.checkpoint.tensor_file import Buffers, aligned_empty, copy_values, is_aligned
from xglm_core.checkpoint.tensor_writing import equal_values
from xglm_core.config import XGLMConfig
from xglm_core.errors import CheckpointError, InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.hub import HubOptions
from xglm_core.keywords import split_options
from xglm_core.weight_names import EMBEDDING, HEAD, IGNORED, WeightSpec, weight_specs

_COPIED_VALUES = 2**19  # How many values a thread copies at a time.
_RELEASED_BLOCKS = 32  # After so many blocks, the pages of the file are freed.
MOST_LAYERS = 1000  # The weights of more layers are listed only if a checkpoint has as many tensors.


_Model = TypeVar("_Model")


@dataclass(frozen=True)
class Loading:
    """The keywords of a model's `from_pretrained`.

    Attributes:
        dtype: the type that was given under any name, or None.
    """

    dtype: Any
    _weights: str | None
    _hub: HubOptions
    _config: Any
    _overrides: dict[str, Any]
    _wants_info: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], *, dtype: Any, weights: str | None) -> Loading:
        """Interprets the further keywords of the call; see `xglm_core.keywords`.

        Raises:
            InputError: one is unknown, not offered, or given under two names.
        """
        hub, rest = split_options(options)
        theirs = rest.pop("torch_dtype", None)
        if theirs is not None and dtype is not None:
            raise InputError("torch_dtype and dtype are both given, expected one of the two")
        for name, format in (("use_safetensors", "safetensors"), ("from_tf", "tf"), ("from_flax", "flax")):
            if rest.pop(name, None) and weights is None:
                weights = format
        config, wants_info = rest.pop("config", None), bool(rest.pop("output_loading_info", False))
        XGLMConfig().check_keys(rest)  # Before anything is downloaded.
        return cls(theirs if dtype is None else dtype, weights, hub, config, rest, wants_info)

    def config_of(self, folder: str | os.PathLike[str] | None) -> XGLMConfig:
        """The configuration for the call; a checkpoint without weights may supply it.

        Raises:
            XGLMError: there is no configuration, or a value is impossible.
        """
        if self._config is not None:
            return self.configured(self._config)
        if folder is None:
            raise InputError("there is neither a checkpoint nor a config, expected one of the two")
        return self.configured(XGLMConfig.from_pretrained(folder, **self._hub))

    def open(self, folder: str | os.PathLike[str] | None) -> Checkpoint:
        """Opens the checkpoint, with the configuration for the call.

        Raises:
            XGLMError: see `open_checkpoint`; or there is no checkpoint, or a value of the configuration is impossible.
        """
        if folder is None:
            raise InputError("the checkpoint is None, expected a folder or the id of a repository")
        checkpoint = open_checkpoint(folder, self._weights, **self._hub)
        checkpoint.config = self.configured(checkpoint.config if self._config is None else self._config)
        return checkpoint

    def configured(self, config: Any) -> XGLMConfig:
        """A configuration, as `XGLMConfig.of` takes it, with the values of the call; see `open`."""
        return XGLMConfig.of(config).with_values(self._overrides)

    def with_info(self, model: _Model) -> _Model:
        """The result of the call: the model; with `output_loading_info`, also the list of misfits, which is empty."""
        names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        info: dict[str, list[str]] = {name: [] for name in names}
        return (model, info) if self._wants_info else model  # type: ignore[return-value]  # Few ask for it.


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint that fits a model, ready to be read weight by weight.

    Attributes:
        config: the checkpoint's configuration, with `tie_word_embeddings` as the stored weights have it, and with
            `quantization_config` if `int8`.
        specs: the model's weights; the checkpoint holds each of them in its shape.
        dtype: the type of the model's weights.
        int8: whether the model's matrices are int8, see `read_int8`.
    """

    config: XGLMConfig
    specs: tuple[WeightSpec, ...]
    dtype: FloatType
    int8: bool
    _checkpoint: Checkpoint

    @property
    def generation(self) -> GenerationConfig:
        """The checkpoint's options for `generate`; a warning names those that are not offered.

        Raises:
            ConfigError: `generation_config.json` is damaged.
        """
        options = GenerationConfig.from_model(self.config, self._checkpoint.folder)
        options.warn_of_others()
        return options

    def read(self, spec: WeightSpec) -> np.ndarray:
        """A weight in canonical shape and `dtype.storage`: a copy-on-write view of the file if the type allows one."""
        return self._checkpoint.read(spec.name, self.dtype)

    def read_int8(self, spec: WeightSpec) -> tuple[np.ndarray, np.ndarray]:
        """A matrix as int8 [out, in], a view of the file if that has it so, and its scales, float32 [out, 1]."""
        return self._checkpoint.read(spec.name, INT8), self._checkpoint.scales(spec.name)

    def aligned(self, spec: WeightSpec, *, transposed: bool = False) -> np.ndarray:
        """A weight in row-major order and `dtype.storage`, at a memory address that is a multiple of 64 bytes.

        Frameworks require this of an array that they use without a copy. It is a copy-on-write view of the file if the
        file has the values in this form, and a copy otherwise.

        Args:
            spec: the weight.
            transposed: whether to transpose it.
        """
        source = self._checkpoint.info(spec.name).dtype
        scales = self._checkpoint.scales(spec.name) if source is INT8 else None
        stored = self._checkpoint.read(spec.name)
        turned = transposed
        if stored.ndim == 2 and stored.T.flags.c_contiguous:  # In the file's order.
            stored, turned = stored.T, not transposed
        if source is self.dtype and not turned and is_aligned(stored):
            return stored
        result = aligned_empty(spec.shape[::-1] if transposed else spec.shape, self.dtype.storage)
        step = max(1, _COPIED_VALUES // max(1, math.prod(stored.shape[1:])))

        def fill(begin: int) -> None:
            rows = slice(begin, begin + step)
            block = converted_by_rows(stored[rows], source, self.dtype, None if scales is None else scales[rows])
            copy_values(result[:, rows] if turned else result[rows], block.T if turned else block)

        begins = range(0, len(stored), step)
        for count, _ in enumerate(map(fill, begins) if len(begins) < 2 else self._threads.map(fill, begins), 1):
            if count % _RELEASED_BLOCKS == 0:
                self.release(spec)
        self.release(spec)
        return result

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Two threads: while one waits for the file or for memory, the other copies. They end with the plan."""
        return ThreadPoolExecutor(2)

    def release(self, spec: WeightSpec) -> None:
        """Frees the file's pages of a weight that the backend has copied."""
        self._checkpoint.release(spec.name)


def plan_loading(
    checkpoint: Checkpoint, *, with_head: bool, dtype: Any = "float32", int8: bool | None = None
) -> LoadPlan:
    """Checks that the checkpoint holds exactly the weights of the model that its configuration describes.

    Args:
        checkpoint: an open checkpoint.
        with_head: whether the model is a causal LM; the bare decoder ignores a stored head.
        dtype: the type of the model's weights, as a name or a framework's type; "auto" is that of the stored embedding.
        int8: whether the model's matrices are int8, whatever those of the checkpoint are; None: as those are.

    Returns:
        The plan. If the stored head differs from the embedding, the model is not tied; a warning says so if the
        configuration ties the two, and another one if matrices of int8 become floats.

    Raises:
        CheckpointError: weights are missing, unexpected or of another shape; the message lists all of them.
        InputError: `dtype` is unknown.
    """
    is_int8 = checkpoint.is_int8 if int8 is None else int8
    config = with_method(XGLMConfig.from_dict(checkpoint.config.to_dict()), int8=is_int8)
    if with_head and config.tie_word_embeddings and not is_tied(checkpoint):
        config.tie_word_embeddings = False
        warnings.warn(
            f"{checkpoint.folder}: the stored {HEAD} differs from {EMBEDDING}, so the two stay untied, "
            "although the configuration ties them",
            stacklevel=3,  # The line that called a backend's `from_pretrained`.
        )
    specs, misfits = compare_weights(checkpoint, config, with_head=with_head)
    if problems := [f"{kind}: {', '.join(names)}" for kind, names in misfits.items() if names]:
        raise CheckpointError(
            f"{checkpoint.folder}: the weights do not fit config.json; {'; '.join(problems)}; "
            "check that config.json and the weights belong together"
        )
    stored = checkpoint.info(EMBEDDING).dtype
    # Models do not use float64.
    wanted = DTYPES.get(stored.name, FLOAT32) if isinstance(dtype, str) and dtype == "auto" else float_type(dtype)
    if checkpoint.is_int8 and not is_int8:
        count = sum(math.prod(spec.shape) for spec in specs)
        warnings.warn(
            f"{checkpoint.folder}: matrices of int8 become {wanted.name} here: they take "
            f"{count * wanted.storage.itemsize / 1e9:.2f} GB in place of {count / 1e9:.2f} GB, and the time of "
            f"{wanted.name}; PyTorch keeps int8",
            stacklevel=3,
        )
    return LoadPlan(config, specs, wanted, is_int8, checkpoint)


def compare_weights(
    checkpoint: Checkpoint, config: XGLMConfig, *, with_head: bool
) -> tuple[tuple[WeightSpec, ...], dict[str, list[str]]]:
    """The weights that a model needs, and the stored ones that do not fit.

    Args:
        checkpoint: an open checkpoint.
        config: the model, with `tie_word_embeddings` as the stored weights have it.
        with_head: whether the model is a causal LM.

    Returns:
        The weights, and descriptions of what is "missing", "unexpected" and of "wrong shape".

    Raises:
        CheckpointError: the model has so many more layers than the checkpoint that listing weights makes no sense.
    """
    if config.num_layers > max(MOST_LAYERS, len(checkpoint.names)):  # Before all their weights are listed.
        raise CheckpointError(
            f"{checkpoint.folder}: config.json has {config.num_layers} layers, but there are only "
            f"{len(checkpoint.names)} tensors; check that config.json and the weights belong together"
        )
    specs = weight_specs(config, with_head=with_head and not config.tie_word_embeddings)
    expected = {spec.name: spec.shape for spec in specs}
    misshaped = [
        f"{name} is {list(found)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in checkpoint.names and (found := checkpoint.info(name).shape) != shape
    ]
    missing = [name for name in expected if name not in checkpoint.names]
    for name, scale in checkpoint.scale_infos.items():
        rows = checkpoint.info(name).shape[0]
        if scale is None:
            missing.append(name + SCALE)
        elif (scale.dtype, scale.shape) != (FLOAT32, (rows, 1)):
            misshaped.append(
                f"{name + SCALE} is {list(scale.shape)} of {scale.dtype.name}, expected {[rows, 1]} of float32"
            )
    return specs, {
        "missing": missing,
        # A head is never unexpected: a bare decoder does not use it, and a tied head repeats the embedding.
        "unexpected": sorted(
            [*(checkpoint.names - expected.keys() - IGNORED - {HEAD})]
            + [f"{name} (of {dtype})" for name, dtype in checkpoint.others.items()]
        ),
        "wrong shape": misshaped,
    }


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has no head of its own, or one that equals the embedding bit for bit."""
    if not {HEAD, EMBEDDING} <= checkpoint.names:
        return True
    head, embedding = checkpoint.info(HEAD), checkpoint.info(EMBEDDING)
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    if head.dtype is INT8 and not np.array_equal(checkpoint.scales(HEAD), checkpoint.scales(EMBEDDING)):
        return False
    return equal_values(
        checkpoint.blocks(HEAD, head.dtype, Buffers()), checkpoint.blocks(EMBEDDING, head.dtype, Buffers())
    )
