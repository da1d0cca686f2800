"""`xglm score`: shows how likely texts are, token by token and word by word."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from xglm_core.checkpoint import open_checkpoint
from xglm_core.cli.lines import STDIN, count_items, opened, read_items
from xglm_core.cli.models import add_model, load_model
from xglm_core.cli.outputs import Output, written_file
from xglm_core.config import XGLMConfig
from xglm_core.errors import InputError
from xglm_core.scoring.html_page import Page
from xglm_core.scoring.output_rows import FORMATS, header, rows
from xglm_core.scoring.texts import BATCH_TOKENS, EncodedText, Item, checked_stride, encode, score_encoded
from xglm_core.tokenization.base import Tokenizer
from xglm_core.tokenization.sentencepiece import XGLMTokenizer

# So many batches are sorted by length at a time: there is little padding, and an interruption costs little.
_GROUP_BATCHES = 8

Group = list[tuple[int, Item, EncodedText]]  # The number of each line, its text or pair, and its tokens.


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm score`."""
    parser.description = (
        "Score each line of a file: log-probabilities of its tokens, perplexity, and the surprisal of its words."
    )
    add_model(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        help='lines of text, or of {"text": ...} or {"context": ..., "continuation": ...}; - for standard input',
    )
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="of the output (%(default)s)")
    parser.add_argument("--words", action="store_true", help="surprisal of words [bits]; as tsv, one row for each word")
    parser.add_argument("--html", metavar="PAGE", help="also write a page that shows how surprising each word is")
    parser.add_argument("--output", metavar="OUT", help="write here; if it exists, go on after its last line (printed)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens by which windows over long texts move (half)")
    parser.add_argument("--newline", choices=["space", "eos"], help="what line breaks become (as the tokenizer says)")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help="at a time (%(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    config = open_checkpoint(arguments.checkpoint, revision=arguments.revision).config
    stride = checked_stride(config, arguments.stride)
    if arguments.batch_tokens < 1:
        raise InputError(f"--batch-tokens is {arguments.batch_tokens}, expected 1 or more")
    tokenizer = XGLMTokenizer.from_pretrained(arguments.checkpoint, revision=arguments.revision)
    total = count_items(arguments.file)
    with Output(arguments.output, header(arguments.format, arguments.words)) as output:
        if arguments.html and output.first > 1:
            raise InputError(
                f"--html shows what one run scores, but {arguments.output} already holds {output.first} lines; leave "
                "out one of the two, or choose another file"
            )
        _, model = load_model(arguments)
        with (
            opened(arguments.file) as file,
            _page(arguments.html, arguments.file) as page,
            _Progress(total) as progress,
        ):
            items = enumerate(read_items(file, arguments.file), start=1)
            for group in _groups(items, config, tokenizer, arguments, output.first):
                scores = score_encoded(model, tokenizer, [text for _, _, text in group], stride, arguments.batch_tokens)
                for (number, item, _), score in zip(group, scores, strict=True):
                    output.write(number, rows(arguments.format, arguments.words, number, item, score))
                    if page:
                        page.add(score)
                output.flush()
                progress.show(group[-1][0], sum(len(text.ids) for _, _, text in group))
        output.finish()
    return 0


def _groups(
    items: Iterator[tuple[int, tuple[str, Item]]],
    config: XGLMConfig,
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
    first: int,
) -> Iterator[Group]:
    """Yields the lines from `first` on, in groups of several batches."""
    group: Group = []
    tokens = 0
    for number, (where, item) in items:
        if number < first:
            continue
        text = encode(config, tokenizer, item, arguments.newline, where)
        group.append((number, item, text))
        tokens += len(text.ids)
        if tokens >= _GROUP_BATCHES * arguments.batch_tokens:
            yield group
            group, tokens = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _page(path: str | None, source: str) -> Iterator[Page | None]:
    """The page, whose file appears once it is complete; None without a path."""
    with written_file(path) as file:
        if file is None:
            yield None
            return
        page = Page(file, f"Surprisal: {'standard input' if source == STDIN else Path(source).name}")
        yield page
        page.end()


class _Progress:
    """A line on stderr with the progress, which disappears at the end; only on a terminal."""

    def __init__(self, total: int | None) -> None:
        self._of = "" if total is None else f" of {total:,}"
        self._tokens = 0
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        self._start = time.monotonic()
        return self

    def show(self, lines: int, tokens: int) -> None:
        """Shows that a group of `tokens` tokens, up to line `lines`, is done."""
        self._tokens += tokens
        if self._shown:
            speed = self._tokens / (time.monotonic() - self._start)
            text = f"\r\x1b[K{lines:,}{self._of} lines, {speed:,.0f} tokens/s"
            print(text, end="", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
