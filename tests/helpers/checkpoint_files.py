"""Checkpoints in each published layout, written by the libraries that write them."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from tests.helpers.frameworks import backends_under_test
from xglm_core import XGLMConfig
from xglm_core.checkpoint.dtypes import FloatType
from xglm_core.checkpoint.file_layout import Entry
from xglm_core.checkpoint.safetensors import SAFETENSORS_WRITER
from xglm_core.checkpoint.tensor_file import Buffers, row_blocks
from xglm_core.checkpoint.tensor_writing import write_values
from xglm_core.weight_names import HEAD, weight_specs

Weights = Mapping[str, np.ndarray]

_BACKEND = {"torch": "torch", "flax": "flax", "jax": "flax", "h5py": "tf"}  # TensorFlow brings h5py along.


def library(name: str) -> Any:
    """Imports a library; skips the test where the backend that has it is not under test."""
    if _BACKEND[name] not in backends_under_test():
        return pytest.importorskip(name)
    return importlib.import_module(name)


def write_safetensors(
    file: BinaryIO,
    tensors: Iterable[tuple[str, FloatType, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Any tensors at all, by the writer under test; they need not be a model's."""
    entries = [Entry(*tensor) for tensor in tensors]
    layout = SAFETENSORS_WRITER.lay_out(file, entries, False)
    write_values(
        file, entries, layout, lambda index: row_blocks(read(entries[index].name), Buffers(), transposed=False)
    )


def tensors(weights: Weights, dtype: str = "float32") -> dict[str, Any]:
    torch = library("torch")
    return {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in weights.items()}


def write_torch(path: Path, weights: Weights, dtype: str = "float32", *, legacy: bool = False) -> None:
    stored = tensors(weights, dtype)
    library("torch").save(stored, path, _use_new_zipfile_serialization=not legacy)


def flax_tree(config: XGLMConfig, weights: Weights) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for spec in weight_specs(config, with_head=True):
        if spec.name in weights:
            owner = tree
            for key in spec.flax[:-1]:
                owner = owner.setdefault(key, {})
            array = weights[spec.name]
            owner[spec.flax[-1]] = np.ascontiguousarray(array.T if spec.transposed else array)
    return tree


def write_flax(path: Path, config: XGLMConfig, weights: Weights) -> None:
    library("flax")
    serialization = importlib.import_module("flax.serialization")
    path.write_bytes(serialization.to_bytes(flax_tree(config, weights)))


def keras_datasets(config: XGLMConfig, weights: Weights, scope: str = "tfxglm_for_causal_lm") -> dict[str, np.ndarray]:
    """As `TFXGLMForCausalLM.save_pretrained` of transformers 4.57 calls them."""
    datasets = {}
    for spec in weight_specs(config, with_head=True):
        if spec.name in weights:
            layer = spec.keras.partition("/")[0]
            stored = spec.keras.replace("embed_tokens/embeddings", "embed_tokens/weight")
            array = weights[spec.name]
            datasets[f"{layer}/{scope}/{stored}:0"] = array.T if spec.transposed else array
    return datasets


def write_keras(path: Path, datasets: Weights, **options: Any) -> None:
    with library("h5py").File(path, "w", **options) as file:
        file.attrs["layer_names"] = sorted({name.partition("/")[0].encode() for name in datasets})
        file.attrs["backend"] = b"tensorflow"
        for name, array in datasets.items():
            file.create_dataset(name, data=array)


def fairseq_checkpoint(config: XGLMConfig, weights: Weights, **settings: Any) -> dict[str, Any]:
    torch = library("torch")
    names = {name: name.replace("model.", "decoder.", 1) for name in weights}
    model = {
        "decoder.version": torch.tensor([3.0]),
        **{names[name]: tensor for name, tensor in tensors(weights).items() if name != HEAD},
        "decoder.embed_positions._float_tensor": torch.zeros(1),
    }
    head = HEAD if HEAD in weights else "model.embed_tokens.weight"
    model["decoder.output_projection.weight"] = (
        tensors({head: weights[head]})[head] if HEAD in weights else model["decoder.embed_tokens.weight"]
    )
    return {
        "args": None,
        "cfg": {
            "common": {"seed": 1, "fp16": True, "log_file": None},
            "model": argparse.Namespace(
                decoder_embed_dim=config.d_model,
                decoder_ffn_embed_dim=config.ffn_dim,
                decoder_layers=config.num_layers,
                decoder_attention_heads=config.attention_heads,
                activation_fn=config.activation_function,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                decoder_layerdrop=config.layerdrop,
                max_target_positions=config.max_position_embeddings,
                no_scale_embedding=not config.scale_embedding,
                share_decoder_input_output_embed=config.tie_word_embeddings,
                **settings,
            ),
        },
        "model": model,
        "optimizer_history": [{"num_updates": 7, "lr_scheduler_state": {"best": None}}],
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": 2.5},
    }


def write_shards(
    folder: Path,
    file: str,
    weights: Mapping[str, Any],
    write: Callable[[Path, dict[str, Any]], None],
    groups: Iterable[Iterable[str]],
) -> None:
    """Shards of the given names, and their index."""
    stem, suffix = file.rsplit(".", 1)
    shards = [list(group) for group in groups]
    weight_map = {}
    for index, names in enumerate(shards):
        shard = f"{stem}-{index + 1:05d}-of-{len(shards):05d}.{suffix}"
        write(folder / shard, {name: weights[name] for name in names})
        weight_map.update(dict.fromkeys(names, shard))
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
