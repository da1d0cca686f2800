"""The cases of `xglm bench` as data: their shapes and inputs, and the least work that each needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xglm_core.checkpoint.convert import WRITABLE
from xglm_core.config import XGLMConfig
from xglm_core.weight_names import num_parameters

FOREIGN = ("hf", "hf-tf", "hf-flax", "ct2", "openvino")  # Peers that run in the Python that has them.
PEERS = (*FOREIGN, "system", "core-fast", "sentencepiece", "tokenizers")
NO_SUCH_CASE = "it has no such case"
VOCABULARY = "sentencepiece.bpe.model"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: its name; a part before a hyphen names several cases.
        about: what it does, for users.
        method: the method of an engine that prepares it.
        rows, length, new: its shape: texts, their tokens, and tokens to add to each.
        unit: what is counted per second.
        core: whether it needs no framework: the engine is "core" in place of the backends.
    """

    name: str
    about: str
    method: str
    rows: int = 1
    length: int = 1
    new: int = 0
    unit: str = "tokens"
    core: bool = False


CASES = {
    case.name: case
    for case in (
        Case("load-cold", "safetensors from the disk, until all weights have been read", "load", unit="MB"),
        Case("load-warm", "safetensors from the system's cache", "load", unit="MB"),
        Case("load-bin-cold", "float16 pytorch_model.bin from the disk", "load", unit="MB"),
        Case("load-bin-warm", "float16 pytorch_model.bin from the system's cache", "load", unit="MB"),
        Case("start", "`xglm generate` of one token, from the shell to that token", "start", new=1),
        Case("prefill", "one prompt, its last logits", "prefill", 1, 512),
        Case("score", "log-probabilities of given tokens", "score", 4, 256),
        Case("decode-1", "continue one prompt", "decode", 1, 32, 32),
        Case("decode-8", "continue 8 prompts", "decode", 8, 32, 32),
        Case("decode-context", "continue one long prompt", "decode", 1, 1024, 32),
        Case(
            "decode-prompts", "continue prompts of 8 to 64 tokens, which end at different places", "decode", 64, 64, 32
        ),
        Case("train", "loss and all gradients", "train", 2, 256),
        Case("loss", "the loss alone, with its gradients, from states and head", "loss", 2, 256),
        Case("tokenize-batch", "encode lines in one call", "tokenize", 40_000, core=True),
        Case("tokenize-lines", "encode lines one by one", "tokenize", 40_000, core=True),
        Case("tokenize-text", "encode one long text", "tokenize", 40_000, core=True),
        *(
            Case(f"convert-{source}-{target}", f"from {source} to {target}", "convert", unit="MB", core=True)
            for source, target in itertools.product(WRITABLE, WRITABLE)
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One case in one engine: all that the process which runs it needs to know.

    Attributes:
        case, rows, length, new: see `Case`.
        engine: its name.
        size, layers: the published size, and another number of blocks or None; for a checkpoint its name and None.
        dtype: the type of the computation.
        quantization: the quantisation of the weights; None means none.
        device: "cpu" or "gpu".
        checkpoint: the folder with `model.safetensors`.
        work: the folder for files that engines need.
        vocabulary, text: the file of the tokenizer, and sentences to encode.
    """

    case: str
    engine: str
    layers: int | None
    rows: int
    length: int
    new: int
    checkpoint: str
    size: str
    dtype: str
    quantization: str | None
    device: str
    work: str
    vocabulary: str
    text: str

    @property
    def module(self) -> str:
        """The module of the engine."""
        return "core" if self.engine in ("core-fast", "sentencepiece", "tokenizers") else self.engine.replace("-", "_")

    @property
    def key(self) -> tuple[Any, ...]:
        """What two measurements of the same have in common, but for the engine."""
        return key(vars(self))


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """`Job.key` of a line of results."""
    names = ("case", "size", "layers", "dtype", "quantization", "device", "rows", "length", "new")
    return tuple(line[name] for name in names)


@dataclass(frozen=True)
class Run:
    """What an engine prepared.

    Attributes:
        run: what is timed, until its results are there. An integer that it returns is the number of units.
        first: the same until the first token, if there are several.
        before: what comes before each run, and is not timed.
    """

    run: Callable[[], Any]
    first: Callable[[], Any] | None = None
    before: Callable[[], None] = lambda: None


def named(name: str) -> list[Case]:
    """The cases with a name or with its first part; all of them for "all"."""
    return [case for case in CASES.values() if name == "all" or f"{case.name}-".startswith(f"{name}-")]


def token_ids(job: Job, config: XGLMConfig) -> np.ndarray:
    """Random ids [rows, length]."""
    return np.random.default_rng(0).integers(10, config.vocab_size, (job.rows, job.length))


def prompts(job: Job, config: XGLMConfig) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Ids and mask of prompts [rows, length], padded on the left, and the ids that end a text.

    Only the prompts of `decode-prompts` differ in length. There, one id in 16 ends a text: random weights
    choose all ids alike. Elsewhere no text ends early.
    """
    ids, mask = token_ids(job, config), np.ones((job.rows, job.length), np.int64)
    if job.case != "decode-prompts":
        return ids, mask, []
    lengths = np.random.default_rng(1).integers(max(1, job.length // 8), job.length + 1, job.rows)
    mask = (np.arange(job.length) >= job.length - lengths[:, None]).astype(np.int64)
    return np.where(mask, ids, 1), mask, list(range(15, config.vocab_size, 16))


def count_new(rows: Any, ends: list[int]) -> int:
    """The number of new tokens in rows of ids, each up to its first end."""
    if not ends:
        return sum(len(row) for row in rows)
    found = (np.flatnonzero(np.isin(row, ends)) for row in rows)
    return sum(int(at[0]) + 1 if len(at) else len(row) for at, row in zip(found, rows, strict=True))


def units(job: Job, config: XGLMConfig) -> int | None:
    """The number of tokens or MB of a case, as far as the shape says it."""
    if CASES[job.case].unit == "MB":
        size = 2 if "bin" in job.case else 1 if job.quantization else 4
        return round(num_parameters(config) * size / 1e6)
    return None if CASES[job.case].core else job.rows * (job.new or job.length)


def work(job: Job, config: XGLMConfig, count: int) -> Iterator[tuple[float, float]]:
    """Yields the bytes to read and the floating-point operations of each pass over the weights; nothing if unknown.

    A pass reads each matrix once, and the keys and values of earlier positions. An operation is a product or a sum.

    Args:
        job: the case.
        config: the architecture.
        count: the number of units that were counted.
    """
    size = 1 if job.quantization == "int8" else _BYTES[job.dtype]
    head, width = config.vocab_size * config.d_model, config.d_model * config.num_layers
    blocks = width * (4 * config.d_model + 2 * config.ffn_dim)

    def one_pass(rows: float, tokens: float, past: float, heads: float) -> tuple[float, float]:
        read = (blocks + head) * size + rows * (past + tokens) * 2 * width * _BYTES[job.dtype]
        pairs = rows * tokens * (past + (tokens + 1) / 2)
        return read, 2 * rows * tokens * blocks + 4 * width * pairs + 2 * heads * head

    match CASES[job.case].method:
        case "load":
            yield count * 1e6, 0
        case "convert":
            yield 2e6 * count, 0
        case "prefill":
            yield one_pass(job.rows, job.length, 0, job.rows)
        case "score":
            yield one_pass(job.rows, job.length, 0, job.rows * (job.length - 1))
        case "decode":
            length = float(prompts(job, config)[1].sum(1).mean())
            yield one_pass(job.rows, length, 0, job.rows)
            rows = (count - job.rows) / max(1, job.new - 1)  # On average; rows that have ended need nothing.
            for step in range(1, job.new):
                yield one_pass(rows, 1, length + step - 1, rows)
        case "train":  # The backward pass multiplies by weights and by states; gradients are written.
            read, operations = one_pass(job.rows, job.length, 0, job.rows * (job.length - 1))
            yield 3 * read, 3 * operations
        case "loss":
            yield 3 * head * size, 6 * job.rows * (job.length - 1) * head
