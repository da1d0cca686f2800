"""`xglm generate`: continues texts, and prints them while they grow."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from xglm_core.checkpoint import open_checkpoint
from xglm_core.cli.lines import STDIN, read_items, standard_input
from xglm_core.cli.models import add_model, load_model
from xglm_core.cli.outputs import Output
from xglm_core.compare.report import json_line
from xglm_core.errors import InputError
from xglm_core.generation.config import GenerationConfig
from xglm_core.generation.many import generate_many
from xglm_core.generation.randomness import drawn_seed
from xglm_core.generation.streaming import GrowingText
from xglm_core.scoring.texts import Item
from xglm_core.tokenization.base import Tokenizer
from xglm_core.tokenization.sentencepiece import XGLMTokenizer

_NEW_TOKENS = 50

# The arguments for options of `GenerationConfig`, and their settings for argparse.
_OPTIONS: dict[str, dict[str, Any]] = {
    "--max-new-tokens": {"type": int, "metavar": "N", "help": f"most tokens to add ({_NEW_TOKENS})"},
    "--min-new-tokens": {"type": int, "metavar": "N", "help": "tokens before which no text ends"},
    "--stop-strings": {"action": "append", "metavar": "TEXT", "help": "end with this text; may be repeated"},
    "--do-sample": {"action": "store_true", "default": None, "help": "draw tokens by their probabilities"},
    "--temperature": {"type": float, "metavar": "T", "help": "below 1 more cautious, above 1 less so"},
    "--top-k": {"type": int, "metavar": "K", "help": "draw from the likeliest K tokens; 0 for all (50)"},
    "--top-p": {"type": float, "metavar": "P", "help": "draw from the likeliest that have this probability together"},
    "--min-p": {
        "type": float,
        "metavar": "P",
        "help": "draw from those with this share of the likeliest's probability",
    },
    "--typical-p": {"type": float, "metavar": "P", "help": "draw from the most typical that have this probability"},
    "--seed": {"type": int, "metavar": "N", "help": "the same seed gives the same texts, in every framework"},
    "--num-beams": {"type": int, "metavar": "N", "help": "search with so many beams"},
    "--length-penalty": {"type": float, "metavar": "X", "help": "above 0 favours longer beams"},
    "--repetition-penalty": {"type": float, "metavar": "X", "help": "above 1 makes tokens of the text less likely"},
    "--no-repeat-ngram-size": {"type": int, "metavar": "N", "help": "repeat no sequence of so many tokens"},
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm generate`."""
    parser.description = "Continue texts. They are printed as they grow, or written to a file, a line of JSON for each."
    add_model(parser)
    parser.add_argument(
        "text", metavar="TEXT", nargs="*", default=[], help="a text to continue; none or - reads lines from stdin"
    )
    for name, settings in _OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.add_argument(
        "--go-on-at-eos", action="store_true", help="do not end at </s>, which is XGLM's line break as well"
    )
    parser.add_argument("--newline", choices=["space", "eos"], help="what line breaks become (as the tokenizer says)")
    parser.add_argument(
        "--output",
        metavar="OUT",
        help="write JSON here, - for stdout; go on after the last line of a file (printed)",
    )
    parser.set_defaults(run=_run, texts_anywhere=True)


def _run(arguments: argparse.Namespace) -> int:
    names = [name.removeprefix("--").replace("-", "_") for name in _OPTIONS]
    options: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    options.setdefault("max_new_tokens", max(_NEW_TOKENS, options.get("min_new_tokens", 0)))
    if arguments.go_on_at_eos:
        options["stop_at_eos"] = False
    checkpoint = open_checkpoint(arguments.checkpoint, revision=arguments.revision)
    generation = GenerationConfig.from_model(checkpoint.config, checkpoint.folder).updated(options)
    if arguments.output and generation.do_sample and generation.seed is None:
        raise InputError("--output with --do-sample needs --seed, so that an interrupted run can go on with the same")
    tokenizer = XGLMTokenizer.from_pretrained(arguments.checkpoint, revision=arguments.revision)
    texts = _texts(arguments.text)
    first = next(texts, None)  # Before the model is loaded, which is slow.
    if first is None:
        raise InputError("there is no text to continue; expected TEXT, or lines on standard input")
    texts = itertools.chain([first], texts)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(Output(arguments.output, "")) if arguments.output else None
        _, model = load_model(arguments)
        if generation.do_sample and generation.seed is None:
            generation = dataclasses.replace(generation, seed=drawn_seed())
            print(f"xglm: --seed {generation.seed} gives the same texts again", file=sys.stderr)
        options |= {"generation_config": generation, "tokenizer": tokenizer}
        continuer = _Continuer(model, tokenizer, arguments.newline, options)
        if output is None:
            for text in texts:
                continuer.show(text)
        else:
            _write(continuer, texts, output)
            output.finish()
    return 0


def _texts(given: list[str]) -> Iterator[str]:
    """Yields the texts of the command line, and the lines of standard input for "-"."""
    for text in given or [STDIN]:
        if text == STDIN:
            yield from (_text(item, where) for where, item in read_items(standard_input(), STDIN))
        elif not text.strip():
            raise InputError("TEXT is empty, expected a text to continue")
        else:
            yield text


def _text(item: Item, where: str) -> str:
    if not isinstance(item, str):
        raise InputError(f"{where}: has a continuation already, expected a text")
    return item


def _write(continuer: _Continuer, texts: Iterator[str], output: Output) -> None:
    """Writes a row of JSON for each text, beginning with the first line that `output` lacks."""
    prompts, again = itertools.tee(texts)
    numbered = itertools.islice(enumerate(again, start=1), output.first - 1, None)
    for (number, prompt), text in zip(numbered, continuer.continued(prompts, output.first - 1), strict=True):
        output.write(number, [json_line({"line": number, "prompt": prompt, "text": text}, ensure_ascii=False)])
        output.flush()


class _Continuer:
    """Continues texts, with a model, its tokenizer and options."""

    def __init__(self, model: Any, tokenizer: Tokenizer, newline: str | None, options: dict[str, Any]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._newline = newline
        self._options = options

    def show(self, prompt: str) -> None:
        """Prints a text, and its continuation while it grows."""
        ids = np.array([self._encoded(prompt)])
        mask = np.ones_like(ids)
        if self._options["generation_config"].num_beams > 1:  # In beam search, no token is final before the end.
            tokens = iter(np.asarray(self._model.generate(ids, mask, **self._options))[:, ids.shape[1] :])
        else:
            tokens = self._model.stream(ids, mask, **self._options)
        text = GrowingText(self._tokenizer, newline=self._newline)
        print(text.add(ids[0]), end="", flush=True)
        for new in tokens:
            print(text.add(new), end="", flush=True)
        print(text.rest(), flush=True)

    def continued(self, prompts: Iterator[str], begin: int) -> Iterator[str]:
        """The continuations of texts from number `begin` on, without the texts."""
        encoded, again = itertools.tee(map(self._encoded, prompts))
        found = generate_many(self._model, encoded, begin=begin, **self._options)
        for ids, new in zip(itertools.islice(again, begin, None), found, strict=True):
            text = GrowingText(self._tokenizer, newline=self._newline)
            text.add(ids)
            yield text.add(new) + text.rest()

    def _encoded(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, newline=self._newline, verbose=False)["input_ids"]
        return ids
