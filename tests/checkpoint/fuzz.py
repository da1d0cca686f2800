"""Changes checkpoint files at random: they must load correctly or be rejected in one line, and nothing else.

    python -m tests.checkpoint.fuzz [CASES] [SEED]

runs that many cases, shared among the readers, and prints what came of them.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.helpers.checkpoint_files import (
    fairseq_checkpoint,
    library,
    write_flax,
    write_keras,
    write_safetensors,
    write_torch,
)
from xglm_core import XGLMConfig
from xglm_core.checkpoint.dtypes import FLOAT32
from xglm_core.checkpoint.formats import FORMATS, open_files
from xglm_core.checkpoint.tensor_file import TensorFile
from xglm_core.errors import CheckpointError
from xglm_core.weight_names import HEAD

CONFIG = XGLMConfig(vocab_size=7, d_model=4, ffn_dim=3, num_layers=1, attention_heads=1)
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "model.embed_tokens.weight": RANDOM.standard_normal((7, 4), dtype=np.float32),
    "model.layers.0.fc1.weight": RANDOM.standard_normal((3, 4), dtype=np.float32),
    "model.layers.0.fc1.bias": RANDOM.standard_normal(3, dtype=np.float32),
}
DATASETS = {
    "model/tfxglm_for_causal_lm/model/embed_tokens/weight:0": WEIGHTS["model.embed_tokens.weight"],
    "model/tfxglm_for_causal_lm/model/layers.0/fc1/kernel:0": WEIGHTS["model.layers.0.fc1.weight"].T,
    "lm_head/tfxglm_for_causal_lm/lm_head/kernel:0": WEIGHTS["model.embed_tokens.weight"].T,
}

# What lengths, offsets and instructions of a pickle turn into.
BYTES = b"\x00\x01\x02\x07\x08\x7f\x80\xfe\xff(.)0123456789NRQbcehijqrstu}]\x81\x85\x86\x87\x8a\x8b\x93\x94"
INTEGERS = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def _write_safetensors(path: Path) -> None:
    with open(path, "wb") as file:
        write_safetensors(file, [(n, FLOAT32, a.shape) for n, a in WEIGHTS.items()], WEIGHTS.__getitem__)


def _write_index(path: Path) -> None:
    """An index, two shards beside it, and metadata, in which most changes mean nothing."""
    weight_map = {}
    for number, names in enumerate(([*WEIGHTS][:1], [*WEIGHTS][1:])):
        shard = path.with_name(f"shard-{number}")
        with open(shard, "wb") as file:
            write_safetensors(file, [(n, FLOAT32, WEIGHTS[n].shape) for n in names], WEIGHTS.__getitem__)
        weight_map.update(dict.fromkeys(names, shard.name))
    path.write_text(json.dumps({"metadata": {"total_size": 172, "note": "x" * 300}, "weight_map": weight_map}))


def _open_index(path: Path) -> list[TensorFile]:
    format = dataclasses.replace(FORMATS["safetensors"], file=path.name.removesuffix(".index.json"))
    return open_files(path.parent, format)


def _opener(format: str) -> Callable[[Path], list[TensorFile]]:
    return lambda path: [FORMATS[format].open(path)]


# Name of a kind of file -> what opens one, and what writes a good one.
KINDS: dict[str, tuple[Callable[[Path], list[TensorFile]], Callable[[Path], object]]] = {
    "safetensors": (_opener("safetensors"), _write_safetensors),
    "torch": (_opener("torch"), lambda path: write_torch(path, WEIGHTS)),
    "torch-legacy": (_opener("torch"), lambda path: write_torch(path, WEIGHTS, legacy=True)),
    "flax": (_opener("flax"), lambda path: write_flax(path, CONFIG, WEIGHTS)),
    "tf": (_opener("tf"), lambda path: write_keras(path, DATASETS)),
    "tf-new": (_opener("tf"), lambda path: write_keras(path, DATASETS, libver="latest")),
    "fairseq": (_opener("fairseq"), lambda path: library("torch").save(fairseq_checkpoint(CONFIG, WEIGHTS), path)),
    "index": (_open_index, _write_index),
}


def mutants(whole: bytes, cases: int, seed: int) -> Iterator[bytes]:
    """Changed copies of a file."""
    chance = random.Random(seed)
    for _ in range(cases):
        mutant = bytearray(whole)
        for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
            _mutate(mutant, chance)
        yield bytes(mutant)


def _mutate(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    # A part of the file, most often a short one.
    length = min(len(data), chance.choice([1, 2, 4, 8, 64, 1024]))
    source = chance.randrange(len(data) - length + 1)
    match chance.randrange(8):
        case 0 | 1 | 2 if at < len(data):
            data[at] = chance.choice(BYTES)
        case 3 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 4:
            width = chance.choice([2, 4, 8])
            number = chance.choice(INTEGERS) % 2 ** (8 * width)
            data[at : at + width] = number.to_bytes(width, chance.choice(["little", "big"]))
        case 5:
            data[at:at] = data[source : source + length]
        case 6:
            data[at : at + length] = data[source : source + length]
        case 7 if chance.random() < 0.5:
            del data[at:]
        case _:
            del data[at : at + length]


def outcome(opener: Callable[[Path], list[TensorFile]], path: Path) -> str:
    """Reads all that a file, or the files of an index, have: "loaded", or what it was rejected for."""
    try:
        files = opener(path)
    except CheckpointError as error:
        message = str(error)
        assert message.startswith(f"{path}: "), message
        assert message.isprintable(), message
        assert len(message) < len(str(path)) + (2000 if opener is _open_index else 320), message  # It lists 8 names.
        return "rejected"
    for file in files:
        size = file.path.stat().st_size
        assert sum(info.nbytes for name, info in file.tensors.items() if name != HEAD) <= size
        for name, info in file.tensors.items():
            array = file.read(name)
            assert array.shape == info.shape
            assert array.dtype == info.dtype.storage
            assert array.copy().nbytes == info.nbytes <= size
            file.release(name)
    return "loaded"


def fuzz(name: str, path: Path, cases: int, seed: int) -> tuple[dict[str, int], float]:
    """Outcomes of so many cases of one kind, and the time of the slowest in seconds."""
    opener, write = KINDS[name]
    path = path.with_name(f"{path.name}.index.json")  # For the index alone, but of no harm to the others.
    write(path)
    counts: dict[str, int] = collections.Counter()
    slowest = 0.0
    for case, mutant in enumerate(mutants(path.read_bytes(), cases, seed)):
        path.unlink()  # Views of the file before may be in use still.
        path.write_bytes(mutant)
        begin = time.perf_counter()
        try:
            counts[outcome(opener, path)] += 1
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}, case {case}")
            raise
        slowest = max(slowest, time.perf_counter() - begin)
    return counts, slowest


def main(cases: int = 20_000, seed: int = 0) -> None:
    """Runs all kinds and prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        for name in KINDS:
            fuzz(name, Path(folder) / "file", 10, seed)  # Loads the libraries.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in KINDS:
            counts, slowest = fuzz(name, Path(folder) / "file", cases // len(KINDS) + 1, seed)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            print(f"{name:13} {dict(counts)}  slowest {1000 * slowest:.0f} ms, memory grown by {grown} MB", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
