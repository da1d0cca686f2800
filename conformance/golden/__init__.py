"""Golden numbers: what transformers computes for the cases, stored so that nobody needs it to run the suite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conformance.calls import CallCase
from conformance.cases import Case
from conformance.generation import CONFIG, GENERATE_CASES, SEEDS, prompts
from conformance.random_weights import random_weights
from xglm_core.config import XGLMConfig

FOLDER = Path(__file__).parent

GREEDY_CASE = "untied_head"
NEW_TOKENS = 13

CALLS_PATH = FOLDER / "calls.npz"
GENERATE_PATH = FOLDER / "generate.npz"

# Of the larger outputs only a part is stored, so that all files together stay below a megabyte.
_LONG = 100
_WIDE = 1000
_GRADIENT_ENTRIES = 35  # All of a vector [d_model], some of a matrix.


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
    return _digest(case.config, case.seed, [case.input_ids, case.attention_mask])


def call_digest(case: CallCase) -> str:
    """The same for a call."""
    return _digest(case.config, case.seed, case.arguments.values())


def generate_digest() -> str:
    """The same for all calls of `generate`."""
    inputs = [array for seed in SEEDS for array in (*random_weights(CONFIG, seed).values(), *prompts(seed))]
    options = repr([(case.name, sorted(case.options.items())) for case in GENERATE_CASES]).encode()
    return _digest(CONFIG, SEEDS[0], [*inputs, np.frombuffer(options, np.uint8)])


def load_call(case: CallCase) -> dict[str, np.ndarray]:
    """Reads the numbers of a call: those of `call_numbers`, and what `Golden` calls digest and versions."""
    with np.load(CALLS_PATH) as file:
        return {key.removeprefix(f"{case.name}/"): file[key] for key in file.files if key.startswith(f"{case.name}/")}


def call_numbers(
    case: CallCase,
    logits: np.ndarray,
    hidden_states: Sequence[np.ndarray],
    attentions: Sequence[np.ndarray],
    cross_attentions: Sequence[np.ndarray],
    loss: float | None,
    gradients: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """What is stored of the outcome of a call: all that means anything, and some of the gradients.

    Args:
        case: the call.
        logits: [batch, length, vocab_size].
        hidden_states: num_layers + 1 arrays [batch, length, d_model].
        attentions: num_layers arrays [batch, heads, length, length].
        cross_attentions: num_layers arrays [batch, heads, length, encoder_length]; empty without encoder states.
        loss: None without labels.
        gradients: by name; empty without labels.

    Returns:
        logits [tokens, vocab_size], hidden_states [num_layers + 1, tokens, d_model], attentions and cross_attentions
        [num_layers, tokens, heads, keys], where tokens are all real positions; loss [1]; gradients [weights, entries]
        in the order of their sorted names. What the call does not compute is left out.
    """
    real = case.real
    numbers = {"logits": logits[real], "hidden_states": np.stack(hidden_states)[:, real]}
    numbers["attentions"] = np.stack(attentions).swapaxes(2, 3)[:, real]
    if cross_attentions:
        numbers["cross_attentions"] = np.stack(cross_attentions).swapaxes(2, 3)[:, real]
    if loss is not None:
        numbers["loss"] = np.array([loss])
        numbers["gradients"] = np.stack([_some_entries(gradients[name]) for name in sorted(gradients)])
    return numbers


def _some_entries(gradient: np.ndarray) -> np.ndarray:
    """The same entries of each array of that size, drawn at random."""
    return gradient.ravel()[np.random.RandomState(0).permutation(gradient.size)[:_GRADIENT_ENTRIES]]


def _digest(config: XGLMConfig, seed: int, inputs: Iterable[np.ndarray | None]) -> str:
    digest = hashlib.sha256()
    for array in (*random_weights(config, seed).values(), *inputs):
        if array is not None:
            digest.update(array.tobytes())
    return digest.hexdigest()
