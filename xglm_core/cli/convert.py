"""`xglm convert`: writes a checkpoint in another format or type."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from xglm_core.checkpoint.convert import WRITABLE, Conversion, plan_conversion
from xglm_core.checkpoint.dtypes import DTYPES, INT8
from xglm_core.checkpoint.formats import FORMATS
from xglm_core.cli import EXIT_FAILED, add_checkpoint
from xglm_core.cli.progress import Progress
from xglm_core.compare.report import load_tolerances, table
from xglm_core.compare.run import installed_backends, progress, run_backend
from xglm_core.compare.worker import Job
from xglm_core.errors import BackendError

_TOKENS = 16  # The length of the two rows that --verify reads.
# The largest relative change of a weight when it is rounded to a type; models compute in float32.
_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-7}
# The largest difference of a logit, in units of the largest logit times the rounding of a weight.
_ROUNDINGS = 10


def configure(parser: argparse.ArgumentParser) -> None:
    """Sets the arguments of `xglm convert`."""
    parser.description = (
        "Write a checkpoint in another format or type. What was written is read back and compared before it takes its "
        "name. Only a few megabytes of the weights are in memory at a time."
    )
    parser.epilog = "Exit code: 0 if all went well, 1 if --verify finds other logits, 2 if the input is wrong."
    add_checkpoint(parser)
    parser.add_argument(
        "destination", metavar="DESTINATION", type=Path, help="folder without weights, or CHECKPOINT itself"
    )
    parser.add_argument("--to", required=True, choices=WRITABLE, help="the format to write")
    parser.add_argument("--weights", choices=FORMATS, help="the format to read, where there are several")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, INT8.name], help="type of the written weights (that of each stored one)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="most bytes in one file (%(default)s)")
    parser.add_argument(
        "--verify", action="store_true", help="load both in each installed framework and compare the logits, too"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    backends: list[str] = []
    if arguments.verify:
        backends, missing = installed_backends()
        if not backends:
            raise BackendError(f"--verify: no backend is installed; {missing[0]}")
    conversion = plan_conversion(
        arguments.checkpoint,
        arguments.destination,
        to=arguments.to,
        weights=arguments.weights,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        revision=arguments.revision,
    )
    bar = Progress(conversion.nbytes)
    try:
        conversion.run(bar.advance)
    except BaseException:
        bar.clear()
        raise
    bar.finish(f"{arguments.destination}: wrote {conversion.format.name}, read back and found equal")
    return _verify(conversion, backends) if backends else 0


def _verify(conversion: Conversion, backends: list[str]) -> int:
    """Compares the logits of source and result in each backend; returns the exit code."""
    config = conversion.config
    length = min(_TOKENS, config.max_position_embeddings)
    input_ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, length)).tolist()
    jobs = [
        Job(str(folder), input_ids, None, [length], weights=name)
        for folder, name in (
            (conversion.source.folder, conversion.source.format),
            (conversion.destination, conversion.format.name),
        )
    ]
    # The order of sums may depend on where equal weights lie in memory.
    roundings = [_ROUNDINGS * _ROUNDING.get(name, 0.0) for name in conversion.changed_types]
    limit = max([load_tolerances().logits, *roundings])
    rows = []
    for backend in backends:
        with tempfile.TemporaryDirectory(prefix="xglm-convert-") as folder, progress(backend):
            before, after = (result.logits for result in run_backend(backend, jobs, Path(folder)).results)
            error = float(np.abs(after - before).max() / np.abs(before).max())
        rows.append((backend, error, error <= limit))
    print(f"Logits of 2 rows of {length} random tokens, before and after")
    print(f"(largest difference / largest logit; up to {limit:.1e} passes)\n")
    print(table(("", "logits", ""), [(name, f"{error:.1e}", "pass" if ok else "FAIL") for name, error, ok in rows]))
    return 0 if all(ok for _, _, ok in rows) else EXIT_FAILED
