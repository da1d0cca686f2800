"""`xglm bench`: makes checkpoints of the published sizes with random weights, for benchmarks."""

from __future__ import annotations

import argparse
import math
import zlib
from pathlib import Path

import numpy as np

from xglm_core.checkpoint.dtypes import DTYPES, FLOAT32, FloatType, convert
from xglm_core.checkpoint.formats import FORMATS
from xglm_core.checkpoint.writing import save_checkpoint
from xglm_core.cli import show_help
from xglm_core.config import CONFIG_FILE, PRESETS, XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import EMBEDDING, num_parameters, weight_specs

# With biases of 0 and norm weights of 1, nobody would notice that a backend forgets them. This deviation is too small
# to change scales.
_VECTOR_STD = 0.02
# A freshly initialised tied model repeats one token for ever, and any two backends agree on that. If tokens weigh more
# than positions, and blocks more than both, the next token depends on all of them, and the text varies.
_EMBEDDING_STD = 0.1
_FC2_GAIN = 20
_BLOCK_VALUES = 2**22  # So many values are drawn at a time, so that the conversion needs little extra memory.


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm bench`."""
    parser.set_defaults(run=show_help, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    make = commands.add_parser(
        "make-checkpoint",
        help="write a checkpoint of a published size with random weights",
        description="Write a checkpoint of a published size, in the published layout, with random weights.",
    )
    make.add_argument("folder", metavar="FOLDER", type=Path, help="where to write; created if it is missing")
    make.add_argument("--size", required=True, help=f"one of {', '.join(PRESETS)}")
    make.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the stored weights (%(default)s)")
    make.add_argument("--seed", type=_seed, default=0, help="the same seed gives the same weights (%(default)s)")
    make.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="most bytes in one file (%(default)s)")
    make.add_argument("--force", action="store_true", help="replace the checkpoint that the folder holds")
    make.set_defaults(run=_make_checkpoint)


def _make_checkpoint(arguments: argparse.Namespace) -> int:
    config, dtype = XGLMConfig.from_preset(arguments.size), DTYPES[arguments.dtype]
    write_random_checkpoint(
        arguments.folder, config, dtype, arguments.seed, max_shard_size=arguments.max_shard_size, force=arguments.force
    )
    print(f"{arguments.folder}: XGLM {arguments.size}, {num_parameters(config):,} random parameters in {dtype.name}")
    for path in sorted(arguments.folder.iterdir()):
        if path.name == CONFIG_FILE or path.name.startswith("model"):
            print(f"  {path.name}  {path.stat().st_size:,} bytes")
    return 0


def write_random_checkpoint(
    folder: Path,
    config: XGLMConfig,
    dtype: FloatType,
    seed: int,
    *,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> None:
    """Writes a checkpoint with random weights, one tensor in memory at a time.

    The embedding is drawn from N(0, 0.1^2), other matrices from N(0, 1 / fan_in), with 20 times this deviation for fc2,
    biases from N(0, 0.02^2) and norm weights from N(1, 0.02^2). So all of them have an effect. A weight depends only on
    its name, its shape and the seed.

    Args:
        folder: created if it is missing.
        config: the architecture.
        dtype: the type of the stored weights.
        seed: a seed that is not negative.
        max_shard_size: see `save_checkpoint`.
        force: whether to replace a checkpoint in the folder.

    Raises:
        InputError: the folder holds a checkpoint and `force` is False, or `max_shard_size` is not a size.
    """
    safetensors = FORMATS["safetensors"]
    found = [name for name in (CONFIG_FILE, safetensors.file, safetensors.index) if (folder / name).exists()]
    if found and not force:
        raise InputError(f"{folder}: already holds {found[0]}; choose another folder, or replace it with --force")
    specs = weight_specs(config, with_head=not config.tie_word_embeddings)
    shapes = {spec.name: spec.shape for spec in specs}
    save_checkpoint(
        folder,
        config,
        specs,
        dtype,
        lambda name: _random_weight(name, shapes[name], dtype, seed),
        max_shard_size,
    )


def _random_weight(name: str, shape: tuple[int, ...], dtype: FloatType, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    mean, deviation = 0.0, shape[-1] ** -0.5
    if len(shape) == 1:
        mean, deviation = float(name.endswith(".weight")), _VECTOR_STD
    elif name == EMBEDDING:
        deviation = _EMBEDDING_STD
    elif name.endswith("fc2.weight"):
        deviation *= _FC2_GAIN
    weight = np.empty(math.prod(shape), dtype.storage)
    for begin in range(0, weight.size, _BLOCK_VALUES):
        numbers = generator.standard_normal(min(_BLOCK_VALUES, weight.size - begin), np.float32)
        numbers *= np.float32(deviation)
        numbers += np.float32(mean)
        weight[begin : begin + numbers.size] = convert(numbers, FLOAT32, dtype)
    return weight.reshape(shape)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more")
    return int(text)
