"""The process that runs one case in one engine, a turn each time it is asked. It speaks lines of JSON."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xglm_core.bench.cases import CASES, NO_SUCH_CASE, Job
from xglm_core.bench.machine import resident, versions
from xglm_core.errors import BackendError, XGLMError


def main() -> None:
    """Prepares the job of the first argument; then a line of the input asks for a turn, and its end for the memory."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Frameworks print, too.

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        _serve(Job(**json.loads(sys.argv[1])), reply)
    except (XGLMError, ModuleNotFoundError) as error:
        reply(reason=" ".join(str(error).split()))


def _serve(job: Job, reply: Callable[..., None]) -> None:
    module = importlib.import_module(f"xglm_core.bench.{job.module}")
    if getattr(module.Engine, CASES[job.case].method, None) is None:
        raise BackendError(NO_SUCH_CASE)
    if hasattr(module, "prepare"):  # In a process of its own, whose memory is not counted.
        writer = multiprocessing.get_context("fork").Process(target=module.prepare, args=(job,))
        writer.start()
        writer.join()
        if writer.exitcode and importlib.util.find_spec(module.PACKAGES[0]):
            raise BackendError("its files could not be written")
    begin = time.perf_counter()
    engine = module.Engine(job)
    imported = time.perf_counter() - begin
    prepared = getattr(engine, CASES[job.case].method)()
    setup, before, peak = time.perf_counter() - begin, resident("VmRSS"), resident("VmHWM")
    with contextlib.suppress(OSError):  # Linux: the largest resident set is counted anew.
        Path("/proc/self/clear_refs").write_text("5")
    prepared.before()
    first, _, _ = _timed(prepared.run)
    if prepared.first:
        prepared.first()
    reply(import_s=imported, setup_s=setup, first_call_s=first, versions=versions(module.PACKAGES))
    for _ in sys.stdin:
        prepared.before()
        seconds, processor, count = _timed(prepared.run)
        first_token = _timed(prepared.first)[0] if prepared.first else None
        reply(seconds=seconds, cpu_s=processor, count=count, first_token_s=first_token)
    prepared.before()  # What was started ends, what was written is removed.
    most = resident("VmHWM")
    if CASES[job.case].method == "start":  # Which another process did.
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    device = getattr(engine, "device_memory", lambda: None)()
    reply(memory_mb=max(most, peak), extra_mb=max(0, most - before), device_mb=device)


def _timed(run: Callable[[], Any]) -> tuple[float, float, int | None]:
    """Seconds, those of the processor, and the number of units, if the call returned it."""
    processor, begin = time.process_time(), time.perf_counter()
    result = run()
    seconds, of_processor = time.perf_counter() - begin, time.process_time() - processor
    return seconds, of_processor, result if isinstance(result, int) else None
