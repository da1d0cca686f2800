"""`xglm eval`: tasks of EleutherAI's lm-evaluation-harness, on any backend."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from xglm_core.checkpoint import open_checkpoint
from xglm_core.cli.models import add_model, load_model
from xglm_core.cli.outputs import written_file
from xglm_core.compare.report import json_line
from xglm_core.errors import InputError
from xglm_core.evaluation.harness import LIST_TASKS, evaluate, find_tasks, register, require_harness
from xglm_core.scoring.texts import BATCH_TOKENS
from xglm_core.tokenization.sentencepiece import XGLMTokenizer

_EXAMPLES = f"""\
examples:
  xglm eval facebook/xglm-564M --tasks xcopa_sw,xstorycloze_sw
  xglm eval facebook/xglm-564M --tasks 'xwinograd_*' --newline eos --json results.json
  xglm eval CHECKPOINT --backend flax --include-path my_tasks --tasks my_task --num-fewshot 4 --limit 100

all tasks: {LIST_TASKS}
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm eval`."""
    parser.description = (
        "Run tasks of EleutherAI's lm-evaluation-harness, and print its table. Needs: pip install 'xglm[eval]'."
    )
    parser.epilog, parser.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,...", help="tasks, groups or tags, * for any characters; or YAML files"
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="folder with YAML files of further tasks")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each (as the task says)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of their choice (%(default)s)")
    parser.add_argument("--limit", type=float, metavar="N", help="only the first N of each task; below 1, a share")
    parser.add_argument("--gen-kwargs", metavar="K=V,...", help="options of generation, over those of the tasks")
    parser.add_argument("--newline", choices=["space", "eos"], help="what line breaks become (as the tokenizer says)")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help="at a time (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all results there, as JSON on one line")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    require_harness()
    _check(arguments)
    # The harness may fork processes to estimate errors, which is unsafe once a framework has threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if not sys.stderr.isatty():  # Progress bars are for people.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    open_checkpoint(arguments.checkpoint, revision=arguments.revision)  # Checked before slow imports.
    tokenizer = XGLMTokenizer.from_pretrained(arguments.checkpoint, revision=arguments.revision)
    with written_file(arguments.json) as file:
        with _harness_on_stderr():
            results = _evaluated(arguments, tokenizer)
        print(_table(results))
        if file:
            file.write(_as_json(results))
    return 0


def _evaluated(arguments: argparse.Namespace, tokenizer: XGLMTokenizer) -> dict[str, Any]:
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise InputError(f"--tasks names no task; see: {LIST_TASKS}")
    manager, tasks = find_tasks(names, arguments.include_path)
    manager.prepare(tasks)
    _, model = load_model(arguments)
    lm = register()(
        model,
        tokenizer,
        name=arguments.checkpoint,
        newline=arguments.newline,
        batch_tokens=arguments.batch_tokens,
    )
    return evaluate(
        lm,
        manager,
        tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        gen_kwargs=arguments.gen_kwargs,
        fewshot_random_seed=arguments.seed,
        log_samples=False,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuses numbers that the harness would misunderstand."""
    for name, value, allowed, expected in (
        ("--batch-tokens", arguments.batch_tokens, arguments.batch_tokens >= 1, "1 or more"),
        ("--num-fewshot", arguments.num_fewshot, (arguments.num_fewshot or 0) >= 0, "0 or more"),
        ("--limit", arguments.limit, _is_limit(arguments.limit), "a number of examples, or a share below 1"),
    ):
        if not allowed:
            raise InputError(f"{name} is {value}, expected {expected}")


def _is_limit(limit: float | None) -> bool:
    return limit is None or 0 < limit < 1 or (limit.is_integer() and limit >= 1)


def _table(results: dict[str, Any]) -> str:
    """A line about the model and the settings, and the harness's tables."""
    from lm_eval.utils import make_table

    config, version = results["config"], results["lm_eval_version"]
    head = f"{config['pretrained']}, {config['backend']}, newline {config['newline']}, lm_eval {version}"
    if config["limit"] is not None:
        head += f", limit {config['limit']:g}: for trials alone"
    tables = [make_table(results, column) for column in ("results", "groups") if results.get(column)]
    return "\n".join([head, "", *tables]).rstrip()


def _as_json(results: dict[str, Any]) -> bytes:
    """All results as JSON on one line; other objects are converted as the harness does."""
    from lm_eval.utils import handle_non_serializable

    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    return f"{json_line(plain, ensure_ascii=False)}\n".encode()


@contextlib.contextmanager
def _harness_on_stderr() -> Iterator[None]:
    """Sends the harness's output to stderr, with its warnings in our form."""
    logger, handler = logging.getLogger("lm_eval"), logging.StreamHandler()
    before = logger.propagate, logger.level
    # The harness's own tasks cause these messages.
    handler.addFilter(lambda record: "using default" not in record.getMessage())
    handler.setFormatter(logging.Formatter("xglm: warning: %(message)s"))
    logger.addHandler(handler)
    logger.propagate, logger.level = False, logging.WARNING
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate, logger.level = before
