"""Continues more prompts than a batch holds, prompts of like length together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import Engine
from xglm_core.generation.loop import Request, generate, steps
from xglm_core.generation.prompts import filled
from xglm_core.generation.randomness import numbered
from xglm_core.generation.surface import GenerationSurface

_WINDOW = 8  # So many batches are sorted at a time: what follows need not be read yet, and results do not wait for it.

# What would make a text depend on its batch, or needs another form of result; and what to use.
_REFUSED = {
    "num_return_sequences": "the prompt several times",
    "return_dict_in_generate": "model.generate",
    "min_length": "min_new_tokens",
    "max_time": "model.generate",
}
_REFUSED_ARGUMENTS = ("inputs", "inputs_embeds", "past_key_values", "prefix_allowed_tokens_fn")


def generate_many(
    model: GenerationSurface,
    prompts: Iterable[Sequence[int]],
    batch_size: int = 8,
    generation_config: GenerationConfig | None = None,
    *,
    begin: int = 0,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Continues any number of prompts, each as `model.generate` continues it alone.

    Batches are made of prompts of like length, the longest first, and rows leave them as they end. The prompts are read
    and sorted 8 batches at a time.

    Args:
        model: a causal language model of any backend.
        prompts: the ids of each prompt, without padding. May be without end.
        batch_size: how many prompts are continued at a time.
        generation_config: see `GenerationSurface.generate`.
        begin: the first prompt to continue. Those before it only count as copies: the n-th of equal prompts draws the
            text that the n-th draws in one call of `model.generate` with all of them.
        options: see `GenerationSurface.generate`; what depends on all rows of a batch is refused.

    Yields:
        The new tokens of each prompt, in the order of the prompts, int64 [new].

    Raises:
        InputError: as by `model.generate`, when the prompts of the error are sorted; or an option that is refused.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}, expected a positive integer")
    for name in _REFUSED_ARGUMENTS:
        if options.get(name) is not None:
            raise InputError(f"generate_many takes no {name}, which belongs to the rows of one batch; use generate")
    rows, copies = itertools.tee([int(token) for token in prompt] for prompt in prompts)
    numbers = numbered(np.array(row, "<i8").tobytes() for row in copies)
    pairs = itertools.islice(zip(rows, numbers, strict=True), begin, None)
    return _results(model, pairs, batch_size, {**options, "generation_config": generation_config}, begin)


def _results(
    model: GenerationSurface,
    pairs: Iterator[tuple[list[int], int]],
    batch_size: int,
    options: dict[str, Any],
    first: int,
) -> Iterator[np.ndarray]:
    """See `generate_many`: of prompts with the numbers of their copies, from prompt `first` on."""
    while window := list(itertools.islice(pairs, batch_size * _WINDOW)):
        for place, (prompt, _) in enumerate(window, start=first):
            if not prompt:
                raise InputError(f"prompts[{place}] is empty, expected ids")
        order = sorted(range(len(window)), key=lambda place: -len(window[place][0]))
        found: dict[int, np.ndarray] = {}
        next_ = 0
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            prompts, numbers = zip(*(window[place] for place in places), strict=True)
            found |= zip(places, _continued(*_begun(model, prompts, numbers, options)), strict=True)
            while next_ in found:
                yield found.pop(next_)
                next_ += 1
        first += len(window)


def _begun(
    model: GenerationSurface, prompts: Sequence[list[int]], numbers: Sequence[int], options: dict[str, Any]
) -> tuple[Engine, Request]:
    """The call for one batch. A seed that it draws goes into `options`: it is that of all batches."""
    mask = filled([[1] * len(prompt) for prompt in prompts], 0)
    engine, request = model._generation(filled(prompts, 0), mask, **options)
    generation, default = request.generation, GenerationConfig()
    for name, instead in _REFUSED.items():
        if getattr(generation, name) != getattr(default, name):
            raise InputError(f"generate_many takes no {name}, which is for one batch; use {instead}")
    if generation.max_length is not None and generation.max_new_tokens is None:
        raise InputError("generate_many takes no max_length, which counts columns of padding; use max_new_tokens")
    if generation.do_sample and generation.seed is None:
        options["seed"] = request.seed
    request.numbers = numbers
    return engine, request


def _continued(engine: Engine, request: Request) -> Iterator[np.ndarray]:
    """The new tokens of each row, without padding."""
    if request.generation.num_beams > 1:
        output = generate(engine, request)
        rows = output.sequences[:, request.prompts.columns.shape[1] :].astype(np.int64)
        lengths = (output.beam_indices >= 0).sum(axis=1)
    else:
        lengths = np.zeros(len(request.prompts.columns), np.int64)
        rows = np.concatenate([*steps(engine, request, lengths=lengths, one_by_one=False)], axis=1)
    return (row[:length] for row, length in zip(rows, lengths, strict=True))
