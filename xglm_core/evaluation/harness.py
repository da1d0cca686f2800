"""Uses the harness: registers our model, finds tasks, and evaluates, with errors in one line."""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xglm_core.errors import BackendError, InputError
from xglm_core.evaluation.adapter import Adapter

LIST_TASKS = "python -m xglm_core.evaluation ls tasks"
_CLOSE = 5  # The number of names to suggest.


def require_harness() -> None:
    """Checks, without an import, that the harness is installed.

    Raises:
        BackendError: it is not installed; the message names the pip extra.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BackendError("evaluation needs lm_eval, not installed here; run: pip install 'xglm[eval]'")


@functools.cache
def register() -> type[Any]:
    """Makes `Adapter` a model of the harness, under the name "xglm", and returns its class.

    Afterwards `lm_eval.simple_evaluate(model="xglm", model_args={"pretrained": "facebook/xglm-564M"}, ...)` works. An
    instance of the class may replace the name.

    Raises:
        BackendError: the harness is not installed.
    """
    require_harness()
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    kind = type("XGLM", (Adapter, TemplateLM), {"__doc__": Adapter.__doc__, "__module__": __name__})
    register_model("xglm")(kind)
    return kind


def find_tasks(names: Sequence[str], folder: str | None) -> tuple[Any, list[str]]:
    """Finds tasks without loading them.

    Args:
        names: names of tasks, groups or tags, with "*" for any characters; or paths of YAML files.
        folder: a folder with further tasks, which take precedence; None for none.

    Returns:
        A task manager of the harness with our errors, and the names that it knows.

    Raises:
        InputError: there is no such folder, or no such task.
    """
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder, expected one with the YAML files of tasks")
    if folder is not None:
        manager = task_manager([folder], include_defaults=False)
        if {*names} <= {*manager.all_subtasks}:  # Reading the harness's own definitions takes seconds.
            return manager, _check_names(manager, names)
    manager = task_manager([folder] if folder else [])
    return manager, _check_names(manager, names)


def task_manager(folders: Sequence[str], *, include_defaults: bool = True) -> Any:
    """A task manager of the harness with our errors.

    Args:
        folders: folders with further tasks; for the same name, the last one takes precedence.
        include_defaults: whether to include the harness's own tasks.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):  # type: ignore[misc]
        ready: tuple[list[str], Any] | None = None

        def prepare(self, names: list[str]) -> None:
            """Loads tasks before the slower model; the next `load` returns them."""
            self.ready = names, self.load(names)

        def load(self, task_list: Any) -> Any:
            """See the base class."""
            if self.ready is not None and self.ready[0] == task_list:
                (_, loaded), self.ready = self.ready, None
                return loaded
            try:
                loaded = super().load(task_list)
            except Exception as error:  # A task's own code, its data reader, or the network failed.
                raise InputError(_reason(task_list, error)) from error
            for name, task in loaded["tasks"].items():
                for mark, meaning in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "has images")):
                    if getattr(task, mark, False):
                        raise InputError(f"task {name}: {meaning}; expected a task of text alone")
            return loaded

    return Manager(include_path=list(folders), include_defaults=include_defaults)


def evaluate(lm: Any, manager: Any, names: Sequence[str], **options: Any) -> dict[str, Any]:
    """`simple_evaluate` of the harness.

    Args:
        lm: an instance of the class that `register` returns.
        manager: the result of `find_tasks`.
        names: the tasks.
        options: options of `simple_evaluate`.

    Returns:
        The harness's results.

    Raises:
        InputError: a task cannot be loaded.
    """
    from lm_eval import simple_evaluate

    results: dict[str, Any] = simple_evaluate(model=lm, tasks=list(names), task_manager=manager, **options)
    return results


def _check_names(manager: Any, names: Sequence[str]) -> list[str]:
    """The names without patterns and repetitions; raises `InputError` for an unknown name."""
    found: list[str] = []
    for name in names:
        is_file = Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()
        matches = [name] if is_file else manager.match_tasks([name])
        if not matches:
            raise InputError(_unknown(name, manager.all_tasks))
        found += [match for match in matches if match not in found]
    return found


def _reason(names: Any, error: Exception) -> str:
    """The reason why tasks cannot be loaded, in one line."""
    lines = str(error).strip().splitlines()
    text = f"{', '.join(map(str, names))}: cannot be loaded: {type(error).__name__}: {lines[0] if lines else ''}"
    if isinstance(error, ConnectionError) or "offline" in text.lower() or "reach" in text.lower():
        text += "; its data come from the Hugging Face Hub the first time: connect, or use a task on local files"
    return text


def _unknown(name: str, known: Sequence[str]) -> str:
    """The message for an unknown task, with similar names."""
    close = difflib.get_close_matches(name, known, n=_CLOSE, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else f"see: {LIST_TASKS}"
    return f"no task {name!r}; {hint}"
