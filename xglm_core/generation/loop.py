"""The generation loop, written once over the protocol that each backend's engine implements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.beams import search
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import BLOCK, Engine, Processor, no_token
from xglm_core.generation.prompts import Prompts, filled
from xglm_core.generation.randomness import Keys, drawn_seed
from xglm_core.generation.rules import PrefixFunction, RuleMaker, allowed_ids
from xglm_core.generation.stopping import Criterion, StopStrings, stopped
from xglm_core.inputs import check_positions
from xglm_core.outputs import GenerateOutput
from xglm_core.rounding import power_of_two, rounded_up


class Streamer(Protocol):
    """Receives a text while it is generated."""

    def put(self, value: np.ndarray) -> None:
        """Takes the prompts, int64 [rows, length], and then each new token, int64 [rows]."""

    def end(self) -> None:
        """Is called after the last token."""


@dataclass
class Request:
    """One call of `generate`, with everything but the engine.

    Attributes:
        config: the model's configuration.
        generation: the options.
        prompts: the prompts.
        processors: hooks that change the logits of each step.
        tokenizer: the tokenizer for `stop_strings`.
        criteria: functions that end rows.
        prefix: a function that gives the ids that may follow a text; None allows all.
        draw: draws a seed if the options have none.
        numbers: which copy of its prompt each row is, where the prompts are a part of many, see `generate_many`. None
            counts the copies among these prompts.
        seed: the seed of this call; None if nothing is sampled.

    Raises:
        InputError: the options do not fit the model or each other, the text would grow past `max_position_embeddings`,
            or a function is expected where something else is given.
    """

    config: XGLMConfig
    generation: GenerationConfig
    prompts: Prompts
    processors: Sequence[Processor] = ()
    tokenizer: Any = None
    criteria: Sequence[Criterion] = ()
    prefix: PrefixFunction | None = None
    draw: Callable[[], int] = drawn_seed
    numbers: Sequence[int] | None = None
    seed: int | None = field(init=False)
    limit: int = field(init=False)
    maker: RuleMaker = field(init=False)
    stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = self.prompts.without(self.generation.padding)
        self.limit = self.generation.new_tokens(self.prompts.columns.shape[1])
        self.maker = RuleMaker(self.generation, self.config, self.prompts.columns.shape[1], self.limit)
        self.stops = StopStrings(self.generation.stops, self.tokenizer)
        check_positions(0, self.prompts.longest + self.limit - 1, self.config)
        self._begin = time.monotonic()
        if not isinstance(self.criteria, list | tuple) or not all(map(callable, self.criteria)):
            raise InputError(f"stopping_criteria is a {type(self.criteria).__name__}, expected a list of functions")
        if self.prefix is not None and not callable(self.prefix):
            raise InputError(f"prefix_allowed_tokens_fn is a {type(self.prefix).__name__}, expected a function")
        self.seed = self.generation.seed
        if self.generation.do_sample and self.seed is None:
            self.seed = self.draw()

    @property
    def stepwise(self) -> bool:
        """Whether a hook or the clock must see each token before the next one is computed."""
        return bool(self.processors or self.criteria or self.prefix or self.generation.max_time is not None)

    def stopped(self, engine: Engine, ids: np.ndarray, record: Mapping[str, list[Any]]) -> np.ndarray:
        """Which rows the clock or a user's function ends: bool [rows]; see `steps`."""
        late = self.generation.max_time is not None and time.monotonic() - self._begin > self.generation.max_time
        result = np.full(len(ids), late)
        if self.criteria:
            result |= stopped(self.criteria, engine.ids(ids), tuple(record["scores"]) if "scores" in record else None)
        return result

    def allowed(self, engine: Engine, ids: np.ndarray, prompts: Sequence[int | None]) -> list[np.ndarray] | None:
        """The ids that each row may get; None allows all. See `allowed_ids`."""
        if self.prefix is None:
            return None
        return allowed_ids(self.prefix, engine.ids(ids), prompts, self.config.vocab_size)

    @property
    def copies(self) -> int:
        """The number of rows for each prompt."""
        return 1 if self.generation.num_beams > 1 else self.generation.num_return_sequences

    def remaining(self, engine: Engine, held: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Lets rows that have ended leave the engine, unless somebody looks at all of them.

        Compiled code is there for certain numbers of rows. So powers of two remain, and only where other prompts will
        use the programs again: to compile one takes as long as it saves in a hundred steps.

        Args:
            engine: the engine.
            held: the rows that it holds, integers [places].
            ended: which rows have ended, bool [rows].

        Returns:
            The rows that it holds now.
        """
        generation, compiles = self.generation, engine.bucket > 1
        is_seen = generation.return_dict_in_generate or self.stepwise or engine.shows_rows
        if is_seen or (compiles and self.numbers is None):
            return held
        order = np.argsort(ended[held], kind="stable")  # Those that go on come first.
        count = int((~ended[held]).sum())
        count = power_of_two(count) if compiles else count
        if count >= len(held):
            return held
        engine.reorder(order[:count])
        return held[order[:count]]

    def prefill(self, engine: Engine) -> None:
        """Lets `engine` read the prompts."""
        generation, prompts = self.generation, self.prompts
        tokens, mask = prompts.left_padded(engine.bucket, generation.pad_id)
        capacity = mask.shape[1] + rounded_up(self.limit, engine.bucket)
        penalized = generation.repetition_penalty != 1
        seen = filled(prompts.sequences, self.config.vocab_size).astype(np.int32) if penalized else None
        engine.prefill(tokens, mask, capacity, seen)


def generate(engine: Engine, request: Request, streamer: Streamer | None = None) -> GenerateOutput:
    """Continues each row until it ends or is long enough.

    Args:
        engine: an engine for this call alone.
        request: the call.
        streamer: receives the prompt, then each token as soon as it is chosen.

    Returns:
        See `GenerateOutput`; numpy arrays, except for `scores`, `logits` and `past_key_values`.

    Raises:
        InputError: see `steps`; or a streamer is given for a beam search, in which no token is final before the end.
    """
    generation = request.generation
    if streamer is not None and generation.num_beams > 1:
        raise InputError("streamer is given, but num_beams is above 1: no token of a beam is final before the end")
    record: dict[str, list[Any]] = {name: [] for name in ("scores", "logits") if getattr(generation, f"output_{name}")}
    columns = np.repeat(request.prompts.columns, generation.num_return_sequences, axis=0)
    cache = None
    if generation.num_beams > 1:
        request.prefill(engine)
        rows, found, parents = search(engine, request, record)
    else:
        blocks: list[np.ndarray] = []
        lengths = np.zeros(len(columns), np.int64)
        if streamer is not None:
            streamer.put(columns)
        for block in steps(engine, request, record, lengths, one_by_one=streamer is not None):
            blocks.append(block)
            if streamer is not None:
                streamer.put(block[:, 0])
        if streamer is not None:
            streamer.end()
        rows, found, parents = np.concatenate(blocks, axis=1), None, None
        if generation.return_dict_in_generate and generation.use_cache:
            cache = _cache(engine, request, lengths)
    return GenerateOutput(
        sequences=np.concatenate([columns, rows], axis=1).astype(request.prompts.dtype),
        sequences_scores=found,
        past_key_values=cache,
        beam_indices=parents,
        **{name: tuple(items) for name, items in record.items()},
    )


def _cache(engine: Engine, request: Request, lengths: np.ndarray) -> Any:
    """The cache of all columns of the result except the last one, which the model has not read.

    Args:
        engine: the engine after generation.
        request: the call.
        lengths: the number of new tokens of each row [rows].
    """
    places, width = request.prompts.places(engine.bucket)
    new = np.arange(int(lengths.max()) - 1)
    copies = request.copies
    return engine.cache(
        np.concatenate([places.repeat(copies, axis=0), np.tile(width + new, (len(lengths), 1))], axis=1),
        np.concatenate([request.prompts.mask.repeat(copies, axis=0) != 0, new < lengths[:, None]], axis=1),
    )


def steps(
    engine: Engine,
    request: Request,
    record: Mapping[str, list[Any]] = MappingProxyType({}),
    lengths: np.ndarray | None = None,
    *,
    one_by_one: bool = True,
) -> Iterator[np.ndarray]:
    """Continues each row, without beams.

    Args:
        engine: an engine for this call alone.
        request: the call.
        record: lists to which the "scores" and "logits" of each step are appended.
        lengths: is filled with the number of new tokens of each row, int64 [rows]; None if not needed.
        one_by_one: whether to yield each token as soon as it is chosen, not up to `BLOCK` tokens at a time.

    Yields:
        The next tokens, int64 [rows, new]; the padding id for rows that have ended.

    Raises:
        InputError: logits contain NaN, all ids are banned, or a user's function returns something unusable.
    """
    generation, prompts = request.generation, request.prompts
    request.prefill(engine)
    copies = request.copies
    if copies > 1:
        engine.reorder(np.repeat(np.arange(len(prompts.tokens)), copies))
    sequences = [list(sequence) for sequence in prompts.sequences for _ in range(copies)]
    begins = [len(sequence) for sequence in sequences]
    fingerprints = [fingerprint for fingerprint in prompts.fingerprints for _ in range(copies)]
    keys = Keys(request.seed, fingerprints, request.numbers)
    blocks = [np.repeat(prompts.as_read(generation.pad_id), copies, axis=0)]  # What the model has read of each row.
    ended = np.zeros(len(sequences), bool)
    held = np.arange(len(sequences))  # The row in each place of the engine.
    eos = generation.eos_ids
    one_by_one = one_by_one or request.stepwise or bool(record)
    last, done = None, 0
    while done < request.limit and not ended.all():
        held = request.remaining(engine, held, ended)
        count = 1 if one_by_one or last is None else min(BLOCK, request.maker.steps_without_change(done))
        read = np.concatenate(blocks, axis=1) if request.stepwise else blocks[0]
        asked = [None if end else row for row, end in enumerate(ended.tolist())]
        texts = [sequences[row] for row in held]
        rules = request.maker.rules(texts, done, request.allowed(engine, read, asked))
        noise = keys.of_steps(done, count)[held]
        if last is None or one_by_one:
            if last is not None:
                engine.feed(last[held])
            if "logits" in record:
                record["logits"].append(engine.recorded())
            if request.processors:
                engine.process(request.processors, read)
            if "scores" in record:
                record["scores"].append(engine.scores(rules))
            selected = engine.select(rules, noise[:, 0])[:, None]
        else:
            selected = engine.advance(last[held], rules, noise)
        block = np.full((len(sequences), selected.shape[1]), generation.pad_id, np.int64)
        block[held] = selected
        block[ended] = generation.pad_id
        last = block[:, -1].copy()
        for row in np.flatnonzero(~ended):
            for place, token in enumerate(block[row].tolist()):
                if token < 0:
                    raise no_token(token, int(row), done + place)
                sequences[row].append(token)
                if token in eos or request.stops.found(sequences[row], begins[row]):
                    block[row, place + 1 :] = generation.pad_id
                    ended[row] = True
                    break
        longest = max(len(sequence) - begin for sequence, begin in zip(sequences, begins, strict=True))
        block = block[:, : longest - done]
        done += block.shape[1]
        blocks.append(block)
        if lengths is not None:
            lengths[:] = [len(sequence) - begin for sequence, begin in zip(sequences, begins, strict=True)]
        if request.stepwise:
            ended |= request.stopped(engine, np.concatenate(blocks, axis=1), record)
        yield block


def stream(engine: Engine, request: Request) -> Iterator[np.ndarray]:
    """`steps` as an iterator over single tokens, int64 [rows].

    Raises:
        InputError: see `steps`; or a beam search is asked for.
    """
    if request.generation.num_beams > 1:
        raise InputError("num_beams is above 1, but no token of a beam is final before the end; expected 1 to stream")
    return (block[:, 0] for block in steps(engine, request))
