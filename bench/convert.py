"""How fast `convert_checkpoint` is, and how much memory it takes, beside `cp` of the same bytes.

    xglm bench make-checkpoint --size 564M random-564M
    python bench/convert.py random-564M --work converted

Every format is converted into each. A conversion runs in a process of its own, right after `cp` and `sync` of the
larger one of its two files; its time includes the start of Python, reading back, comparing and fsync. The size, and so
"GB/s", is that of the larger file too: tf_model.h5 holds the tied matrix twice, and both copies are read and compared.
Of several runs the medians are printed; the memory is the largest resident set, in which mapped pages of files count.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In place of this folder, where this file would be taken for a module of its name.
sys.path[0] = str(ROOT)

from xglm_core.checkpoint.convert import WRITABLE  # noqa: E402
from xglm_core.checkpoint.formats import FORMATS  # noqa: E402

_CONVERSION = "import sys; from xglm_core import convert_checkpoint; convert_checkpoint(*sys.argv[1:3], to=sys.argv[3])"


def measure(command: list[str]) -> tuple[float, float, float]:
    """Runs a command; returns its seconds, those of the processor, and its largest resident set in MB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Prints a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with model.safetensors in one file")
    parser.add_argument("--work", type=Path, required=True, help="folder to write into; needs five times the space")
    parser.add_argument("--runs", type=int, default=3, help="of each pair and of its cp (%(default)s)")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    sources = {"safetensors": arguments.checkpoint}
    for name in WRITABLE[1:]:
        sources[name] = arguments.work / name
        shutil.rmtree(sources[name], ignore_errors=True)
        measure([sys.executable, "-c", _CONVERSION, str(arguments.checkpoint), str(sources[name]), name])
    print("from         to              GB  seconds   GB/s  of cp  CPU seconds  cp's  memory MB")
    for first, second in itertools.product(WRITABLE, WRITABLE):
        files = [sources[name] / FORMATS[name].file for name in (first, second)]
        larger = max(files, key=lambda file: file.stat().st_size)
        copy, target = arguments.work / "copy", arguments.work / "target"
        copied, converted = [], []
        for _ in range(arguments.runs):
            copied.append(measure(["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(larger), str(copy)]))
            copy.unlink()
            converted.append(measure([sys.executable, "-c", _CONVERSION, str(sources[first]), str(target), second]))
            shutil.rmtree(target)
        size = larger.stat().st_size / 1e9
        seconds, processor, memory = map(statistics.median, zip(*converted, strict=True))
        copy_seconds, copy_processor, _ = map(statistics.median, zip(*copied, strict=True))
        print(
            f"{first:12} {second:12} {size:5.2f}  {seconds:7.2f}  {size / seconds:5.2f}  "
            f"{copy_seconds / seconds:5.0%}  {processor:11.2f}  {copy_processor:4.2f}  {memory:9.0f}",
            flush=True,
        )
    for name in WRITABLE[1:]:
        shutil.rmtree(sources[name])


if __name__ == "__main__":
    main()
