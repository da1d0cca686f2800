"""The generation loop, written once over the protocol that each backend's engine implements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.generation.beams import search
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.engine import BLOCK, Engine, Processor, no_token
from xglm_core.generation.prompts import Prompts, filled, rounded_up
from xglm_core.generation.randomness import Keys
from xglm_core.generation.rules import RuleMaker
from xglm_core.generation.stopping import StopStrings
from xglm_core.inputs import check_positions
from xglm_core.outputs import GenerateOutput


class Streamer(Protocol):
    """What follows a text as it grows."""

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
        prompts: what to continue.
        processors: hooks that change the logits of each step.
        tokenizer: for `stop_strings`.

    Raises:
        InputError: the options do not fit the model or each other, or the text would grow past
            `max_position_embeddings`.
    """

    config: XGLMConfig
    generation: GenerationConfig
    prompts: Prompts
    processors: Sequence[Processor] = ()
    tokenizer: Any = None
    limit: int = field(init=False)
    maker: RuleMaker = field(init=False)
    stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = self.prompts.without(self.generation.padding)
        self.limit = self.generation.new_tokens(self.prompts.columns.shape[1])
        self.maker = RuleMaker(self.generation, self.config)
        self.stops = StopStrings(self.generation.stops, self.tokenizer)
        check_positions(0, self.prompts.longest + self.limit - 1, self.config)

    @property
    def copies(self) -> int:
        """Rows for each prompt."""
        return 1 if self.generation.num_beams > 1 else self.generation.num_return_sequences

    def prefill(self, engine: Engine) -> None:
        """Reads the prompts, so that `engine` has the logits of their last tokens."""
        generation, prompts = self.generation, self.prompts
        tokens, mask = prompts.left_padded(engine.bucket, generation.filler)
        capacity = mask.shape[1] + rounded_up(self.limit, engine.bucket)
        penalized = generation.repetition_penalty != 1
        seen = filled(prompts.texts, self.config.vocab_size).astype(np.int32) if penalized else None
        engine.prefill(tokens, mask, capacity, seen)


def generate(engine: Engine, request: Request, streamer: Streamer | None = None) -> GenerateOutput:
    """Continues each row until it ends or is long enough.

    Args:
        engine: the backend's engine, used for this call alone.
        request: what to do.
        streamer: is told the prompt and each token as soon as it is there.

    Returns:
        numpy arrays, apart from `scores` and `logits`; see `GenerateOutput`.

    Raises:
        InputError: see `steps`; or a streamer is given and beams, of which none is final until the end.
    """
    generation = request.generation
    if streamer is not None and generation.num_beams > 1:
        raise InputError("streamer is given, but num_beams is above 1: no token of a beam is final before the end")
    record: dict[str, list[Any]] = {name: [] for name in ("scores", "logits") if getattr(generation, f"output_{name}")}
    columns = np.repeat(request.prompts.columns, generation.num_return_sequences, axis=0)
    if generation.num_beams > 1:
        request.prefill(engine)
        rows, found, parents = search(engine, request, record)
    else:
        blocks = []
        if streamer is not None:
            streamer.put(columns)
        for block in steps(engine, request, record, one_by_one=streamer is not None):
            blocks.append(block)
            if streamer is not None:
                streamer.put(block[:, 0])
        if streamer is not None:
            streamer.end()
        rows, found, parents = np.concatenate(blocks, axis=1), None, None
    return GenerateOutput(
        sequences=np.concatenate([columns, rows], axis=1),
        sequences_scores=found,
        beam_indices=parents,
        **{name: tuple(items) for name, items in record.items()},
    )


def steps(
    engine: Engine, request: Request, record: Mapping[str, list[Any]] = MappingProxyType({}), *, one_by_one: bool = True
) -> Iterator[np.ndarray]:
    """Continues each row, without beams.

    Args:
        engine: the backend's engine, used for this call alone.
        request: what to do.
        record: lists that get the "scores" and "logits" of each step.
        one_by_one: whether to yield each token as soon as it is there; else up to `BLOCK` of them at a time.

    Yields:
        The next tokens, int64 [rows, new]; of rows that ended the padding id.

    Raises:
        InputError: logits are not numbers, or all ids are banned.
    """
    generation, prompts = request.generation, request.prompts
    request.prefill(engine)
    copies = request.copies
    if copies > 1:
        engine.reorder(np.repeat(np.arange(len(prompts.tokens)), copies))
    texts = [list(text) for text in prompts.texts for _ in range(copies)]
    begins = [len(text) for text in texts]
    keys = Keys(generation.seed, [content for content in prompts.contents for _ in range(copies)])
    blocks = [np.repeat(prompts.as_read(generation.filler), copies, axis=0)]  # What the model has read of each row.
    ended = np.zeros(len(texts), bool)
    eos = generation.eos_ids
    one_by_one = one_by_one or bool(record or request.processors)
    last, done = None, 0
    while done < request.limit and not ended.all():
        same = request.maker.steps_without_change(done) or request.limit
        count = 1 if one_by_one or last is None else min(BLOCK, same, request.limit - done)
        rules = request.maker.rules(texts, done)
        noise = keys.of_steps(done, count)
        if done == 0 and generation.forced_bos_token_id is not None:
            block = np.full((len(texts), 1), generation.forced_bos_token_id)
        elif last is None or one_by_one:
            if last is not None:
                engine.feed(last)
            if "logits" in record:
                record["logits"].append(engine.logits)
            if request.processors:
                engine.process(request.processors, np.concatenate(blocks, axis=1))
            if "scores" in record:
                record["scores"].append(engine.scores(rules))
            block = engine.select(rules, noise[:, 0])[:, None]
        else:
            block = engine.advance(last, rules, noise)
        block = np.where(ended[:, None], generation.filler, block)
        last = block[:, -1].copy()
        for row in np.flatnonzero(~ended):
            for place, token in enumerate(block[row].tolist()):
                if token < 0:
                    raise no_token(token, int(row), done + place)
                texts[row].append(token)
                if token in eos or request.stops.found(texts[row], begins[row]):
                    block[row, place + 1 :] = generation.filler
                    ended[row] = True
                    break
        longest = max(len(text) - begin for text, begin in zip(texts, begins, strict=True))
        block = block[:, : longest - done]
        done += block.shape[1]
        blocks.append(block)
        yield block


def stream(engine: Engine, request: Request) -> Iterator[np.ndarray]:
    """`steps` as an iterator over single tokens, int64 [rows].

    Raises:
        InputError: beams are asked for; or see `steps`.
    """
    if request.generation.num_beams > 1:
        raise InputError("num_beams is above 1, but no token of a beam is final before the end; expected 1 to stream")
    return (block[:, 0] for block in steps(engine, request))
