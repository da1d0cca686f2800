"""Runs cases: each engine in a process of its own, and all engines of a case in turn."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from xglm_core.backends import BACKENDS
from xglm_core.bench.cases import CASES, FOREIGN, VOCABULARY, Job, named, units, work
from xglm_core.bench.core import written
from xglm_core.checkpoint.dtypes import FLOAT32
from xglm_core.checkpoint.folder import open_checkpoint
from xglm_core.cli.bench import write_random_checkpoint
from xglm_core.compare.run import installed_backends
from xglm_core.config import XGLMConfig
from xglm_core.errors import BackendError, InputError
from xglm_core.tokenization.sentencepiece import XGLMTokenizer

# Defaults for the processes, which the environment may replace. The CPU alone computes, unless a GPU is asked for.
_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow", "HF_HUB_OFFLINE": "1"}
_CPU = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
_WORKER = "from xglm_core.bench.worker import main; main()"
# Another Python has packages of its own; of ours it needs `xglm_core` alone.
_FOREIGN_WORKER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("xglm_core", {str(Path(__file__).resolve().parents[1] / "__init__.py")!r})
sys.modules["xglm_core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["xglm_core"])
{_WORKER}
"""


class _Worker:
    """The process of one job.

    Its methods raise `BackendError` if it cannot run the job; the message is the reason.
    """

    def __init__(self, job: Job, python: str) -> None:
        self.job = job
        self.found: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Starts the process, which prepares the job and runs it once."""
        foreign = self.job.engine in FOREIGN
        path = "" if foreign else os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {**_ENVIRONMENT, **(_CPU if self.job.device == "cpu" else {}), **os.environ, "PYTHONPATH": path}
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        code = [self._python, "-P", "-c", _FOREIGN_WORKER] if foreign else [sys.executable, "-P", "-c", _WORKER]
        self._process = subprocess.Popen(
            [*code, json.dumps(vars(self.job))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.found |= self._answer()

    def turn(self) -> None:
        """Runs the job once more."""
        print(file=self._running().stdin, flush=True)
        self.turns.append(self._answer())

    def end(self) -> None:
        """Ends the process, and asks for its memory before."""
        self._running().stdin.close()  # type: ignore[union-attr]
        self.found |= self._answer()

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout, self._errors):
                pipe.close()  # type: ignore[union-attr]
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def _answer(self) -> dict[str, Any]:
        process = self._running()
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            code = process.wait()
            self._errors.seek(0)
            last = [text.strip() for text in self._errors if text.strip()][-1:]
            killed = "it was killed, as happens when memory runs out"
            raise BackendError(killed if code == -9 else f"it failed: {' '.join(last) or f'exit code {code}'}")
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            raise BackendError(answer["reason"])
        return answer


def measure(
    jobs: Iterable[Job], turns: int, python: str, limits: dict[str, float], leave_out: Callable[[Job, str], None]
) -> Iterator[dict[str, Any]]:
    """Yields the results of each job. Jobs of one case run in turn; an engine that cannot run one is left out.

    Args:
        jobs: jobs of a case and shape follow each other.
        turns: how often each one is timed.
        python: the interpreter that has the peers.
        limits: see `machine.limits`.
        leave_out: is told why an engine was left out.
    """
    for _, group in itertools.groupby(jobs, key=lambda job: job.key):
        workers = [_Worker(job, python) for job in group]
        try:
            for act in (_Worker.begin, *[_Worker.turn] * turns, _Worker.end):
                for worker in [*workers]:
                    try:
                        act(worker)
                    except BackendError as error:
                        leave_out(worker.job, str(error))
                        worker.stop()
                        workers.remove(worker)
            for worker in workers:
                yield _results(worker, limits)
        finally:
            for worker in workers:
                worker.stop()


def plan(arguments: argparse.Namespace) -> list[Job]:
    """The jobs that the arguments of `xglm bench` ask for; checkpoints that they need are written.

    Raises:
        InputError: the arguments contradict each other, or do not fit the model.
        XGLMError: the checkpoint cannot be read or written.
    """
    backends = arguments.backend or installed_backends()[0]
    if arguments.checkpoint and arguments.layers:
        raise InputError("--layers makes a checkpoint, but --checkpoint names one; leave out one of the two")
    if arguments.against and shutil.which(arguments.peer_python) is None:
        raise InputError(f"--peer-python is {arguments.peer_python}, expected an interpreter")
    arguments.work.mkdir(parents=True, exist_ok=True)
    given = {name: getattr(arguments, name) for name in ("dtype", "quantization", "device")}
    given |= {name: str(getattr(arguments, name)) for name in ("work", "vocabulary", "text")}
    given["size"] = Path(arguments.checkpoint).resolve().name if arguments.checkpoint else arguments.size
    jobs: list[Job] = []
    for case, layers in itertools.product(named(arguments.case), arguments.layers or [None]):
        engines = ["core"] if case.core else backends
        checkpoint = _checkpoint(arguments, layers)
        shapes = [
            wanted if wanted and own > least else [own]
            for wanted, own, least in (
                (arguments.rows, case.rows, 0 if case.core or case.length > 1 else case.rows),
                (arguments.length, case.length, 1),
                (arguments.new_tokens, case.new, 1),
            )
        ]
        for (rows, length, new), engine in itertools.product(
            itertools.product(*shapes), [*engines, *arguments.against]
        ):
            job = Job(case.name, engine, layers, rows, length, new, str(checkpoint), **given)
            if length + new > (most := XGLMConfig.from_pretrained(checkpoint).max_position_embeddings):
                raise InputError(f"{case.name}: {length} and {new} new tokens do not fit the window of {most} tokens")
            if case.method == "tokenize" and not (arguments.vocabulary.exists() and arguments.text.exists()):
                raise InputError(
                    f"{case.name}: needs --vocabulary and --text, which are bundled with the sources alone"
                )
            if "bin" in case.name:
                job = dataclasses.replace(job, checkpoint=str(written(job, "torch", "float16")))
            elif arguments.quantization and engine in BACKENDS:
                job = dataclasses.replace(job, checkpoint=str(written(job, "safetensors", arguments.quantization)))
            jobs.append(job)
    return jobs


def _checkpoint(arguments: argparse.Namespace, layers: int | None) -> Path:
    """The folder of the checkpoint, which is written if it is missing."""
    if arguments.checkpoint:
        return Path(open_checkpoint(arguments.checkpoint).folder)
    folder = Path(arguments.work) / (arguments.size if layers is None else f"{arguments.size}-{layers}")
    if not folder.exists():
        config = XGLMConfig.from_preset(arguments.size, **({} if layers is None else {"num_layers": layers}))
        if arguments.vocabulary.exists():  # Ids that it lacks are not to be generated, as they have no text.
            config.padding_rows = max(0, config.vocab_size - XGLMTokenizer(str(arguments.vocabulary)).vocab_size)
        with tempfile.TemporaryDirectory(dir=arguments.work) as unfinished:
            write_random_checkpoint(Path(unfinished) / "model", config, FLOAT32, 0, max_shard_size="100GB")
            if arguments.vocabulary.exists():
                shutil.copy(arguments.vocabulary, Path(unfinished) / "model" / VOCABULARY)
            (Path(unfinished) / "model").rename(folder)
    return folder


def _results(worker: _Worker, limits: dict[str, float]) -> dict[str, Any]:
    """A line of results."""
    job, turns, found = worker.job, worker.turns, worker.found
    config = XGLMConfig.from_pretrained(job.checkpoint)
    middle = {
        name: statistics.median(turn[name] for turn in turns)
        for name in ("seconds", "cpu_s", "first_token_s", "count")
        if turns[0][name] is not None
    }
    seconds, times = middle["seconds"], [turn["seconds"] for turn in turns]
    count: Any = middle.get("count", units(job, config))
    line = {
        name: value for name, value in vars(job).items() if name not in ("checkpoint", "work", "vocabulary", "text")
    }
    line |= {"median_s": seconds, "spread": (max(times) - min(times)) / seconds, "all_s": times}
    line |= {"cpu_s": middle["cpu_s"], "first_token_s": middle.get("first_token_s")}
    line |= {"unit": CASES[job.case].unit, "units": count, "units_per_s": count / seconds}
    line |= {"compile_s": max(0.0, found.pop("first_call_s") - seconds), "limit_s": None, "of_limit": None}
    passes = list(work(job, config, count))
    if passes and limits:
        reading, computing = limits["read_gb_s"] * 1e9, limits["float32_gflop_s"] * 1e9
        line["limit_s"] = sum(max(read / reading, operations / computing) for read, operations in passes)
        line["of_limit"] = line["limit_s"] / seconds
    return _rounded({**line, **found, "limits": limits})


def _rounded(value: Any) -> Any:
    """Four significant digits for each float, at any depth."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
