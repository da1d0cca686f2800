"""Loads converted checkpoints with the classes of transformers, and theirs with our readers; prints the differences.

    pip install torch transformers==4.57.6 "tensorflow-cpu<2.20" "tf-keras<2.20" "jax<0.7" "flax<0.11" "numpy<2.2" h5py
    python -m conformance.golden.conversions

Runs where transformers 4.57 is installed with all three of its frameworks; a later one has PyTorch alone and leaves the
other columns out. Each number is the largest difference of a logit, relative to the largest logit, from those that the
PyTorch class computes from the original file.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # transformers knows Keras 2 alone.

import numpy as np
import torch
import transformers

from conformance.random_weights import write_checkpoint
from xglm_core import XGLMConfig, convert_checkpoint, open_checkpoint
from xglm_core.checkpoint import plan_loading
from xglm_core.compare.oracle import checkpoint_reader, forward

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=30, ffn_dim=53, num_layers=3, attention_heads=5)
UNTIED = XGLMConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": False})
IDS = np.random.RandomState(0).randint(4, CONFIG.vocab_size, (2, 11))
SHARDS = "30KB"


def main() -> None:
    """Prints a line for each file that was written and for each class that reads it."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    print("transformers", transformers.__version__)
    for title, config in (("tied", CONFIG), ("untied", UNTIED)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(folder / "original", config, seed=1)
            expected = _hf_logits("torch", folder / "original")
            for line, logits in (*_ours_to_theirs(folder), *_theirs_to_ours(folder)):
                error = np.abs(logits - expected).max() / np.abs(expected).max()
                print(f"{title:6}  {line:58}  {error:.1e}", flush=True)


def _ours_to_theirs(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """What transformers computes from files that we wrote."""
    for format, classes in {
        "safetensors": ("torch",),
        "torch": ("torch",),
        "flax": ("flax",),
        "tf": ("tf",),
    }.items():
        for kind, size in (("one file", "5GB"), ("shards", SHARDS)):
            target = folder / f"{format}-{kind.replace(' ', '-')}"
            convert_checkpoint(folder / "original", target, to=format, max_shard_size=size)
            for name in filter(_is_there, classes):
                yield f"ours, {format}, {kind}, in their {name} class", _hf_logits(name, target)


def _theirs_to_ours(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """What the oracle computes from files that transformers wrote."""
    for name in filter(_is_there, ("torch", "tf", "flax")):
        model = _hf_model(name, folder / ("original" if name == "torch" else f"{name}-one-file"))
        for kind, size in (("one file", "5GB"), ("shards", SHARDS)):
            target = folder / f"theirs-{name}-{kind.replace(' ', '-')}"
            model.save_pretrained(target, max_shard_size=size, safe_serialization=False)
            checkpoint = open_checkpoint(target)
            config = plan_loading(checkpoint, with_head=True).config
            outcome = forward(config, checkpoint_reader(checkpoint), IDS, np.ones_like(IDS))
            yield f"theirs, {name}, {kind}, in our oracle", outcome.logits


def _hf_model(name: str, folder: Path) -> Any:
    prefix = {"torch": "", "tf": "TF", "flax": "Flax"}[name]
    return getattr(transformers, f"{prefix}XGLMForCausalLM").from_pretrained(folder)


def _hf_logits(name: str, folder: Path) -> np.ndarray:
    model = _hf_model(name, folder)
    if name == "torch":
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(IDS)).logits)
    return np.asarray(model(IDS).logits)


def _is_there(name: str) -> bool:
    modules = {"torch": ("torch",), "tf": ("tensorflow", "tf_keras"), "flax": ("jax", "flax")}[name]
    current = name == "torch" or int(transformers.__version__.partition(".")[0]) < 5
    return current and all(importlib.util.find_spec(module) for module in modules)


if __name__ == "__main__":
    main()
