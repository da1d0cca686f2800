"""The command line: `xglm COMMAND`. Each command is a module of this package, and is imported on use."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from xglm_core import __version__
from xglm_core.errors import InputError, XGLMError

# The module of a command has `configure(parser)`, which adds its arguments and sets `run`: (arguments) -> exit code.
_COMMANDS = {
    "generate": "continue texts",
    "score": "log-probabilities, perplexity and surprisal of texts",
    "eval": "run tasks of lm-evaluation-harness",
    "convert": "write a checkpoint in another format or type",
    "inspect": "show what a checkpoint holds, without loading it",
    "compare": "run a checkpoint in each framework and compare the results",
    "bench": "measure time and memory, beside other programs",
}

EXIT_FAILED = 1  # A check of the command did not pass.
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells.


class _Parser(argparse.ArgumentParser):
    """A parser with errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None means those of the process.

    Returns:
        The exit code: 0, 1 if a check did not pass, 2 if the input was wrong (with one line on stderr), 130 if
        interrupted. Any other exception is a defect of this package, and is not caught.
    """
    if sys.stderr is None:  # It is closed: discard messages, so that nothing else fails.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        print("xglm: error: standard output is closed; redirect it to a file, or to /dev/null", file=sys.stderr)
        return EXIT_BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Some terminals cannot show all scripts.
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return _run(sys.argv[1:] if argv is None else list(argv))
            finally:
                sys.stdout.flush()  # At the interpreter's exit, a closed pipe could not be caught.
    except XGLMError as error:
        print("xglm: error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        _drop_output()  # The reader has stopped reading, as `head` does.
        return EXIT_FAILED
    except OSError as error:  # For example, the disk is full or gone.
        where = "output" if error.filename is None else error.filename
        print(f"xglm: error: {where}: cannot be read or written: {error.strerror or error}", file=sys.stderr)
        _drop_output()
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name a checkpoint: `checkpoint` and `revision`."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder with config.json and the weights, or a repository on the Hugging Face Hub",
    )
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of the repository (main)")


def show_help(arguments: argparse.Namespace) -> int:
    """Runs a command without its sub-command: prints the help of `arguments.parser`."""
    arguments.parser.print_help()
    return 0


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog="xglm", description="XGLM in PyTorch, TensorFlow/Keras 3 and JAX/Flax, with the same numbers."
    )
    parser.add_argument("--version", action="version", version=f"xglm {__version__}")
    parser.set_defaults(run=show_help, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if argv[:1] == [name]:
            importlib.import_module(f"xglm_core.cli.{name}").configure(command)
    arguments, rest = parser.parse_known_args(argv)
    # argparse accepts no more texts after an option.
    if rest and (
        not hasattr(arguments, "texts_anywhere") or any(item.startswith("-") and item != "-" for item in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.text += rest
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _drop_output() -> None:
    """Discards what standard output still buffers: flushing it at the interpreter's exit would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Replaces `warnings.showwarning`: users of a command do not need our source line."""
    print("xglm: warning:", message, file=sys.stderr)
