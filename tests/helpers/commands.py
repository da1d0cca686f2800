"""Running the command line, or Python code, as a user does: in a process of its own."""

import json
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


def assert_refused(run, *parts):
    """Exit code 2, nothing printed, and one line that names what is wrong."""
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("xglm: error: ")
    assert run.stderr.endswith("\n")
    assert run.stderr.count("\n") == 1
    for part in parts:
        assert part in run.stderr


# As if packages were not installed: `find_spec` finds nothing, `import` raises ModuleNotFoundError.
_HIDE = """
import sys

class Hiding:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

def hide(*names):
    sys.meta_path[:] = [Hiding(finder, names) for finder in sys.meta_path]
"""


def run(code, **environment):
    """Runs Python code in a fresh interpreter and returns what it printed last, as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", _HIDE + code],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
