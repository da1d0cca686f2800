"""Running the command line as a user does: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_XGLM = "import sys; from xglm_core.cli import main; sys.exit(main())"


def run_xglm(*arguments, before="", path=(), **variables):
    """Runs `xglm ARGUMENTS`.

    Args:
        arguments: as on the command line.
        before: Python statements to run first.
        path: folders to import from before all others.
        variables: added to the environment.
    """
    return subprocess.run(
        [sys.executable, "-P", "-c", before + _XGLM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
