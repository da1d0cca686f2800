"""Runs parts of the suite: `python -m conformance.hf_suite torch tokenizers`, where transformers is installed.

`make hf-suite` makes the environments and runs all parts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

PARTS = ("torch", "tokenizers", "tf", "flax")
HERE = Path(__file__).parent
# Nothing is fetched while tests run, and those that start processes do not wait long for them.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTEST_TIMEOUT": "60"}


def fetched(folder: Path) -> Path:
    """The common tests of the installed version of transformers, from its source distribution.

    Args:
        folder: where that is kept.

    Returns:
        The folder with the package `hf_tests`.
    """
    name = f"transformers-{version('transformers')}"
    package = folder / name / "hf_tests"
    if not package.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        wanted = name.replace("-", "==")
        subprocess.run([*command, "--no-binary", "transformers", "--dest", folder, wanted], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            members = [item for item in archive.getmembers() if item.name.startswith(f"{name}/tests/")]
            archive.extractall(folder, members, filter="data")
        package.symlink_to("tests")
        (package / "__init__.py").touch()
    return package.parent


def main() -> int:
    """Runs the parts that are named; the exit status is that of the first one that fails."""
    parser = argparse.ArgumentParser(prog="python -m conformance.hf_suite", description=__doc__.partition(":")[0])
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to run")
    parser.add_argument("--theirs", action="store_true", help="check the lists against transformers' own classes")
    parser.add_argument("--folder", type=Path, default=Path(".hf-suite"), help="where the distributions are kept")
    arguments, rest = parser.parse_known_args()
    tests = fetched(arguments.folder)
    for part in arguments.parts:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "conformance.hf_suite.plugin", "-p", "no:cacheprovider"]
        command += ["-o", "addopts="]  # Their marks are none of ours.
        options = ["--hf-tests", tests, "--hf-part", part, *(["--hf-theirs"] if arguments.theirs else []), *rest]
        # Its own TensorFlow classes are of Keras 2; ours are of Keras 3 and refuse to be imported beside this.
        environment = {**os.environ, **ENVIRONMENT, "TF_USE_LEGACY_KERAS": "1" if arguments.theirs else "0"}
        tests_of_part = HERE / f"test_{part}.py"
        status = subprocess.run([*command, tests_of_part, *options], env=environment, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
