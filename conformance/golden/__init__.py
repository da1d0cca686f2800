"""Golden numbers: what transformers computes for the cases, stored so that nobody needs it to run the suite."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conformance.cases import Case
from conformance.random_weights import random_weights

FOLDER = Path(__file__).parent

GREEDY_CASE = "untied_head"
NEW_TOKENS = 13

# Of the larger outputs only a part is stored, so that all files together stay below a megabyte.
_LONG = 100
_WIDE = 1000


@dataclass(frozen=True, eq=False)
class Golden:
    """The numbers of one case.

    Attributes:
        logits: float32 [batch, positions, columns]; those of padding mean nothing.
        positions: which of the sequence they belong to, int64.
        columns: which ids of the vocabulary they belong to, int64.
        table_error: largest difference between the position table of transformers and ours.
        digest: `case_digest` of the case that they were computed for.
        versions: of what computed them.
        greedy: input_ids and what `generate(do_sample=False)` appends, int64 [batch, length + NEW_TOKENS], for
            `GREEDY_CASE` alone.
    """

    logits: np.ndarray
    positions: np.ndarray
    columns: np.ndarray
    table_error: float
    digest: str
    versions: str
    greedy: np.ndarray | None = None


def golden_path(case: Case) -> Path:
    """The file of a case."""
    return FOLDER / f"{case.name}.npz"


def load_golden(case: Case) -> Golden:
    """Reads the numbers of a case."""
    with np.load(golden_path(case)) as file:
        return Golden(**{name: array.item() if array.ndim == 0 else array for name, array in file.items()})


def kept_positions(length: int) -> np.ndarray:
    """The positions of a sequence whose logits are stored: all, or every 97th and the last 8."""
    return np.array([p for p in range(length) if length <= _LONG or p % 97 == 0 or p >= length - 8])


def kept_columns(vocab_size: int) -> np.ndarray:
    """The ids whose logits are stored: all, or every 997th and the last 8."""
    return np.array([i for i in range(vocab_size) if vocab_size <= _WIDE or i % 997 == 0 or i >= vocab_size - 8])


def case_digest(case: Case) -> str:
    """SHA-256 of the weights and the input of a case, by which golden numbers that are out of date are found."""
    digest = hashlib.sha256()
    for array in (*random_weights(case.config, case.seed).values(), case.input_ids, case.attention_mask):
        if array is not None:
            digest.update(array.tobytes())
    return digest.hexdigest()
