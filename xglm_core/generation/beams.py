"""Beam search, as in transformers since 4.50: the same beams, the same rules for when to stop.

Engines find the best continuations of each prompt's beams. Which of them go on is decided here, prompt by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import NOT_A_NUMBER, NOTHING_LEFT, Engine, no_token
from xglm_core.generation.prompts import filled
from xglm_core.generation.randomness import Keys

if TYPE_CHECKING:
    from xglm_core.generation.loop import Request

_IMPOSSIBLE = np.float32(-1e9)  # The score of a beam that does not exist; finite, so that sums stay finite.


@dataclass(frozen=True)
class _Beam:
    """A continuation: its score, its new tokens, and for each token the beam that it continued."""

    score: np.float32
    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()


@dataclass
class _Search:
    """The beams of one prompt.

    Attributes:
        generation: the options.
        limit: the largest number of new tokens.
        running: the beams that go on, best first. At the start all but one are impossible: otherwise all would take the
            same token.
        finished: the beams that have ended, best first, at most `num_beams`.
        open: whether a better beam may still be found.
    """

    generation: GenerationConfig
    limit: int
    running: list[_Beam] = field(init=False)
    finished: list[_Beam] = field(default_factory=list)
    open: bool = True

    def __post_init__(self) -> None:
        count = self.generation.num_beams
        self.running = [_Beam(np.float32(0)), *([_Beam(_IMPOSSIBLE)] * (count - 1))]

    def extend(self, candidates: list[_Beam], ends: list[bool]) -> None:
        """Takes the best continuations, best first; `ends` says which of them have ended."""
        count, length = self.generation.num_beams, len(candidates[0].tokens)
        pairs = list(zip(candidates, ends, strict=True))
        going = [beam for beam, end in pairs if not end]
        ended = [replace(beam, score=beam.score + _IMPOSSIBLE) for beam, end in pairs if end]
        full = len(self.finished) == count
        if self.open and not (full and self.generation.early_stopping is True):
            # A beam that ends counts only among the best `count`; the others can only go on.
            divisor = np.float32(length**self.generation.length_penalty)
            ending = [replace(beam, score=beam.score / divisor) for beam, end in pairs[:count] if end]
            self.finished = sorted([*self.finished, *ending], key=lambda beam: -beam.score)[:count]
        # Sampled candidates come in the order in which they were drawn.
        going.sort(key=lambda beam: -beam.score)
        self.running = [*going, *ended][:count]
        if len(self.finished) == count:
            never = self.generation.early_stopping == "never" and self.generation.length_penalty > 0
            best = self.running[0].score / np.float32(
                (self.limit if never else length) ** self.generation.length_penalty
            )
            self.open &= bool(going) and bool(best > self.finished[-1].score)
            self.open &= self.generation.early_stopping is not True
        self.open &= bool(going) and bool(going[0].score > -np.inf)


def search(engine: Engine, request: Request, record: dict[str, list[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the best continuations of each prompt.

    Args:
        engine: the engine, which has read the prompts.
        request: the call.
        record: lists to which the "scores" and "logits" of each step are appended.

    Returns:
        New tokens, int64 [sequences, new] with prompts * num_return_sequences sequences; their scores, float32
        [sequences]; and the beam that each token continued, int64 [sequences, new].

    Raises:
        InputError: see `xglm_core.generation.loop.steps`.
    """
    generation, prompts = request.generation, request.prompts
    count, groups = generation.num_beams, len(prompts.tokens)
    # So many that `count` go on even if every beam could end with every end id.
    kept = request.maker.min_tokens_to_keep * count
    keys = Keys(request.seed, prompts.fingerprints, request.numbers)
    searches = [_Search(generation, request.limit) for _ in range(groups)]
    read = prompts.as_read(generation.pad_id)
    engine.reorder(np.repeat(np.arange(groups), count))
    for step in range(request.limit):
        sequences = [
            [*prompts.sequences[group], *beam.tokens] for group in range(groups) for beam in searches[group].running
        ]
        so_far = _ids(read, [group.running for group in searches]) if request.stepwise else read
        asked = [group if beams.open else None for group, beams in enumerate(searches) for _ in range(count)]
        rules = request.maker.rules(sequences, step, request.allowed(engine, so_far, asked))
        if "logits" in record:
            record["logits"].append(engine.recorded())
        if request.processors:
            engine.process(request.processors, so_far)
        if "scores" in record:
            record["scores"].append(engine.scores(rules))
        totals = np.array([[beam.score for beam in group.running] for group in searches], np.float32)
        scores, chosen = engine.candidates(rules, totals, keys.of_steps(step, 1)[:, 0], kept)
        candidates: list[list[_Beam]] = []
        for group, beams in enumerate(searches):
            if beams.open and not scores[group, 0] > -np.inf:
                code = NOT_A_NUMBER if np.isnan(scores[group, 0]) else NOTHING_LEFT
                raise no_token(code, group * count, step)
            candidates.append([])
            for score, index in zip(scores[group], chosen[group].tolist(), strict=True):
                parent, token = divmod(index, request.config.vocab_size)
                beam = beams.running[parent]
                candidates[group].append(_Beam(score, (*beam.tokens, token), (*beam.parents, group * count + parent)))
        stopped = np.zeros((groups, kept), bool)
        if request.stepwise:
            stopped = request.stopped(engine, _ids(read, candidates), record).reshape(groups, kept)
        for group, beams in enumerate(searches):
            begin = len(prompts.sequences[group])
            ends = [
                step + 1 == request.limit
                or stop
                or beam.tokens[-1] in generation.eos_ids
                or request.stops.found([*prompts.sequences[group], *beam.tokens], begin)
                for beam, stop in zip(candidates[group], stopped[group].tolist(), strict=True)
            ]
            beams.extend(candidates[group], ends)
        if not any(beams.open for beams in searches):
            break
        running = [beam for beams in searches for beam in beams.running]
        engine.reorder(np.array([beam.parents[-1] for beam in running]))
        engine.feed(np.array([beam.tokens[-1] for beam in running]))
    # If the user's functions let too few beams end, running ones fill their places.
    best = [beam for beams in searches for beam in [*beams.finished, *beams.running][: generation.num_return_sequences]]
    return (
        filled([beam.tokens for beam in best], generation.pad_id),
        np.array([beam.score for beam in best], np.float32),
        filled([beam.parents for beam in best], -1),
    )


def _ids(read: np.ndarray, groups: list[list[_Beam]]) -> np.ndarray:
    """The tokens of the beams as the model reads them: prompt [prompts, length], then new tokens."""
    return np.array(
        [[*prompt, *beam.tokens] for prompt, beams in zip(read.tolist(), groups, strict=True) for beam in beams],
        np.int64,
    )
