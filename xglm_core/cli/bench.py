"""`xglm bench`: measures time and memory, beside other programs; makes checkpoints with random weights."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.backends import BACKENDS
from xglm_core.bench.cases import PEERS, VOCABULARY, Job, key, named
from xglm_core.bench.report import comparison, plot, read_lines, require_matplotlib, summary
from xglm_core.checkpoint.dtypes import DTYPES, FLOAT32, FloatType, convert
from xglm_core.checkpoint.formats import FORMATS, shortened
from xglm_core.checkpoint.writing import save_checkpoint
from xglm_core.cli import EXIT_FAILED, show_help
from xglm_core.compare.report import json_line
from xglm_core.config import CONFIG_FILE, PRESETS, XGLMConfig
from xglm_core.errors import InputError
from xglm_core.weight_names import EMBEDDING, num_parameters, weight_specs

# With biases of 0 and norm weights of 1, nobody would notice that a backend forgets them. This deviation is too small
# to change scales.
_VECTOR_STD = 0.02
# A freshly initialised tied model repeats one token for ever, and any two backends agree on that. If tokens weigh more
# than positions, and blocks more than both, the next token depends on all of them, and the text varies.
_EMBEDDING_STD = 0.1
_FC2_GAIN = 20
_WORK = Path(tempfile.gettempdir()) / "xglm-bench"
_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"
_BLOCK_VALUES = 2**22  # So many values are drawn at a time, so that the conversion needs little extra memory.


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm bench`."""
    parser.set_defaults(run=show_help, parser=parser)
    parser.description = "Measure time and memory, beside other programs; make checkpoints with random weights."
    commands = parser.add_subparsers(title="cases and commands", metavar="CASE")
    shared = _case_parser()
    for case in named("all"):
        words = case.name.split("-")
        for name in ("-".join(words[:count]) for count in range(1, len(words) + 1)):
            if name not in commands.choices:
                _add_case(commands, name, shared)
    _add_case(commands, "all", shared)
    show = commands.add_parser("show", help="show the results of a file", description="Show the results of a file.")
    show.add_argument("file", metavar="FILE", type=Path, help="written by --json")
    show.add_argument("--plot", metavar="IMAGE", type=Path, help="draw them, too, as .svg, .png or .pdf")
    show.set_defaults(run=_show)
    compare = commands.add_parser(
        "compare",
        help="compare the results of two files",
        description="Compare the results of two files. Where B / A is below 1, the second one is faster.",
    )
    for name in ("A", "B"):
        compare.add_argument(name, type=Path, help="written by --json")
    compare.set_defaults(run=_compare)
    make = commands.add_parser(
        "make-checkpoint",
        help="write a checkpoint of a published size with random weights",
        description="Write a checkpoint of a published size, in the published layout, with random weights.",
    )
    make.add_argument("folder", metavar="FOLDER", type=Path, help="where to write; created if it is missing")
    make.add_argument("--size", required=True, help=f"one of {', '.join(PRESETS)}")
    make.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the stored weights (%(default)s)")
    make.add_argument("--seed", type=_seed, default=0, help="the same seed gives the same weights (%(default)s)")
    make.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="most bytes in one file (%(default)s)")
    make.add_argument("--force", action="store_true", help="replace the checkpoint that the folder holds")
    make.set_defaults(run=_make_checkpoint)


def _add_case(commands: Any, name: str, shared: argparse.ArgumentParser) -> None:
    """Adds a case, or all cases whose names begin alike; help lists the latter alone."""
    found = named(name)
    about = found[0].about if len(found) == 1 else shortened([case.name for case in found], most=4)
    listed = {} if "-" in name else {"help": "all cases" if name == "all" else about}
    parser = commands.add_parser(
        name,
        parents=[shared],
        description=f"Measure: {about}. Each engine has a process of its own. After a call that is not counted, all "
        "engines of a case run in turn.",
        **listed,
    )
    parser.set_defaults(run=_measure, case=name)


def _case_parser() -> argparse.ArgumentParser:
    """The arguments of all cases."""
    parser = argparse.ArgumentParser(add_help=False)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--size", default="564M", choices=PRESETS, help="of a model with random weights (%(default)s)")
    model.add_argument("--checkpoint", metavar="FOLDER", help="measure this checkpoint instead")
    for option, what in (
        ("--layers", "blocks of the model"),
        ("--rows", "texts"),
        ("--length", "tokens of each text"),
        ("--new-tokens", "tokens to add"),
    ):
        parser.add_argument(option, type=_counts, default=[], metavar="N,...", help=f"{what}; several show growth")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation (%(default)s)")
    parser.add_argument("--quantization", choices=["int8"], help="of the weights (none)")
    parser.add_argument("--backend", type=_names(BACKENDS), metavar="NAME,...", help="(those that are installed)")
    parser.add_argument(
        "--against", type=_names(PEERS), default=[], metavar="PEER,...", help=f"some of {', '.join(PEERS)}"
    )
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="the interpreter that has peers")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="timed calls of each engine (%(default)s)")
    parser.add_argument("--work", type=Path, default=_WORK, metavar="FOLDER", help="for checkpoints (%(default)s)")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="FILE",
        default=_EXAMPLE / "checkpoint" / VOCABULARY,
        help="for start and tokenize",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", default=_EXAMPLE / "corpus", help="to tokenize")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a line for each result; skip those it has")
    parser.add_argument("--plot", type=Path, metavar="IMAGE", help="draw the results as .svg, .png or .pdf")
    return parser


def _measure(arguments: argparse.Namespace) -> int:
    from xglm_core.bench import machine, runner  # The runner needs this module, which makes checkpoints.

    if arguments.turns < 1:
        raise InputError(f"--turns is {arguments.turns}, expected 1 or more")
    if arguments.plot:
        require_matplotlib()
    lines = read_lines(arguments.json) if arguments.json and arguments.json.exists() else []
    done = {(key(line), line["engine"]) for line in lines}
    jobs = [job for job in runner.plan(arguments) if (job.key, job.engine) not in done]
    limits, stamp = machine.limits(arguments.device) if jobs else {}, machine.stamp()
    failed = []

    def leave_out(job: Job, reason: str) -> None:
        print(f"xglm: {job.case}: {job.engine} is left out: {reason}", file=sys.stderr, flush=True)
        failed.append(job.engine not in PEERS)

    for line in runner.measure(jobs, arguments.turns, arguments.peer_python, limits, leave_out):
        line["stamp"] = {**stamp, "versions": stamp["versions"] | line.pop("versions")}
        lines.append(line)
        if arguments.json:
            with open(arguments.json, "a", encoding="utf-8") as file:
                print(json_line(line), file=file)
    _report(lines, arguments.plot)
    return EXIT_FAILED if any(failed) else 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        require_matplotlib()
    _report(read_lines(arguments.file), arguments.plot)
    return 0


def _report(lines: list[dict[str, Any]], image: Path | None) -> None:
    if not lines:
        raise InputError("there are no results to show")
    print(summary(lines))
    if image:
        plot(lines, image)


def _compare(arguments: argparse.Namespace) -> int:
    print(comparison(read_lines(arguments.A), read_lines(arguments.B)))
    return 0


def _counts(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}, expected integers of 1 or more, as in 64,128")
    return [int(part) for part in text.split(",")]


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    """A type for argparse: a list of some of the names."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; expected some of {', '.join(known)}")
        return list(dict.fromkeys(text.split(",")))

    return parse


def _make_checkpoint(arguments: argparse.Namespace) -> int:
    config, dtype = XGLMConfig.from_preset(arguments.size), DTYPES[arguments.dtype]
    write_random_checkpoint(
        arguments.folder, config, dtype, arguments.seed, max_shard_size=arguments.max_shard_size, force=arguments.force
    )
    print(f"{arguments.folder}: XGLM {arguments.size}, {num_parameters(config):,} random parameters in {dtype.name}")
    for path in sorted(arguments.folder.iterdir()):
        if path.name == CONFIG_FILE or path.name.startswith("model"):
            print(f"  {path.name}  {path.stat().st_size:,} bytes")
    return 0


def write_random_checkpoint(
    folder: Path,
    config: XGLMConfig,
    dtype: FloatType,
    seed: int,
    *,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> None:
    """Writes a checkpoint with random weights, one tensor in memory at a time.

    The embedding is drawn from N(0, 0.1^2), other matrices from N(0, 1 / fan_in), with 20 times this deviation for fc2,
    biases from N(0, 0.02^2) and norm weights from N(1, 0.02^2). So all of them have an effect. A weight depends only on
    its name, its shape and the seed.

    Args:
        folder: created if it is missing.
        config: the architecture.
        dtype: the type of the stored weights.
        seed: a seed that is not negative.
        max_shard_size: see `save_checkpoint`.
        force: whether to replace a checkpoint in the folder.

    Raises:
        InputError: the folder holds a checkpoint and `force` is False, or `max_shard_size` is not a size.
    """
    safetensors = FORMATS["safetensors"]
    found = [name for name in (CONFIG_FILE, safetensors.file, safetensors.index) if (folder / name).exists()]
    if found and not force:
        raise InputError(f"{folder}: already holds {found[0]}; choose another folder, or replace it with --force")
    specs = weight_specs(config, with_head=not config.tie_word_embeddings)
    shapes = {spec.name: spec.shape for spec in specs}
    save_checkpoint(
        folder,
        config,
        specs,
        dtype,
        lambda name: _random_weight(name, shapes[name], dtype, seed),
        max_shard_size,
    )


def _random_weight(name: str, shape: tuple[int, ...], dtype: FloatType, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    mean, deviation = 0.0, shape[-1] ** -0.5
    if len(shape) == 1:
        mean, deviation = float(name.endswith(".weight")), _VECTOR_STD
    elif name == EMBEDDING:
        deviation = _EMBEDDING_STD
    elif name.endswith("fc2.weight"):
        deviation *= _FC2_GAIN
    weight = np.empty(math.prod(shape), dtype.storage)
    for begin in range(0, weight.size, _BLOCK_VALUES):
        numbers = generator.standard_normal(min(_BLOCK_VALUES, weight.size - begin), np.float32)
        numbers *= np.float32(deviation)
        numbers += np.float32(mean)
        weight[begin : begin + numbers.size] = convert(numbers, FLOAT32, dtype)
    return weight.reshape(shape)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more")
    return int(text)
