"""Shows results of `xglm bench`: tables, comparisons, growth, and plots."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xglm_core.bench.cases import PEERS, key
from xglm_core.compare.report import table
from xglm_core.errors import BackendError, InputError

Line = dict[str, Any]
Growth = tuple[str, list[Line], np.ndarray]

_SIZES = ("layers", "rows", "length", "new")  # What a cost may grow with.


def read_lines(path: Path) -> list[Line]:
    """The results that a file holds.

    Raises:
        InputError: it cannot be read, or a line is not one of `xglm bench`.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            key(line), line["engine"], line["median_s"], line["all_s"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}, line {number}: {text!r:.60} is no result of xglm bench") from None
        lines.append(line)
    return lines


def title(line: Line) -> str:
    """The case with its shape."""
    shape = f" {line['rows']}x{line['length']}" if line["length"] > 1 else ""
    model = "-".join(str(line[name]) for name in ("size", "layers", "dtype", "quantization") if line[name])
    return f"{line['case']}{shape}{'+' + str(line['new']) if line['new'] > 1 else ''} {model}"


def summary(lines: Sequence[Line]) -> str:
    """A table of all results; our engines beside each peer; and how costs grow."""
    peers = [name for name in PEERS if name in {line["engine"] for line in lines}]
    header = ["case", "engine", "seconds", "spread", "first token", "per second", "of limit", "compile", "MB", "GPU MB"]
    rows = []
    for group in _grouped(lines, key):
        together = {line["engine"]: line for line in group}
        for engine, line in together.items():
            ratios = [
                f"{line['median_s'] / together[peer]['median_s']:.2f}"
                if engine not in PEERS and peer in together
                else ""
                for peer in peers
            ]
            rows.append(
                [
                    title(line),
                    engine,
                    f"{line['median_s']:.3f}",
                    f"{line['spread']:.0%}",
                    "" if line["first_token_s"] is None else f"{line['first_token_s']:.3f}",
                    f"{line['units_per_s']:,.1f} {line['unit']}",
                    "" if line["of_limit"] is None else f"{line['of_limit']:.0%}",
                    f"{line['compile_s']:.1f}",
                    f"{line['memory_mb']:,.0f}",
                    "" if line["device_mb"] is None else f"{line['device_mb']:,.0f}",
                    *ratios,
                ]
            )
    text = table([*header, *(f"/ {peer}" for peer in peers)], rows)
    return "\n".join([text, *(_sentence(growth) for growth in growths(lines))])


def growths(lines: Sequence[Line]) -> list[Growth]:
    """What cases cost at three sizes or more that differ in one number: its name, the lines, and the coefficients.

    The fit of seconds by least squares is a + b n, and with four sizes or more a + b n + c n^2, none of them negative
    but a; the coefficients begin with c.
    """
    found: list[Growth] = []
    for name in _SIZES:

        def same(line: Line, name: str = name) -> Any:
            return (*key({**line, name: 0}), line["engine"])

        for group in _grouped(lines, same):
            points = sorted((line for line in group if line[name] is not None), key=lambda line: line[name])
            if len(points) >= 3:
                found.append((name, points, _fit(points, name)))
    return found


def _grouped(lines: Sequence[Line], by: Callable[[Line], Any]) -> list[list[Line]]:
    """The lines that have something in common, in the order of the first of each group."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(by(line), []).append(line)
    return [*groups.values()]


def _fit(points: Sequence[Line], name: str) -> np.ndarray:
    """The coefficients c, b, a; relative errors weigh the same."""
    sizes, seconds = (np.array([point[field] for point in points], np.float64) for field in (name, "median_s"))
    for powers in ([2, 1, 0], [1, 0]) if len(points) > 3 else ([1, 0],):
        columns = sizes[:, None] ** np.array(powers)
        found = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(points)), rcond=None)[0]
        if found[0] > 0:
            break
    return np.concatenate([np.zeros(3 - len(found)), found])


def _sentence(growth: Growth) -> str:
    name, points, (square, slope, constant) = growth
    most = points[-1][name]
    share = square * most**2 / np.polyval([square, slope, constant], most)
    return f"{points[-1]['case']}, {points[-1]['engine']}: seconds = {constant:.3g} + {slope:.3g} {name}" + (
        f" + {square:.2g} {name}^2, of which the square is {share:.0%} at {most}" if square else ""
    )


def comparison(first: Sequence[Line], second: Sequence[Line]) -> str:
    """A table of what both files have: the ratio of medians, and whether all times of one are above the other's."""
    before = {(key(line), line["engine"]): line for line in first}
    rows = []
    for line in second:
        if old := before.get((key(line), line["engine"])):
            apart = "faster" if max(line["all_s"]) < min(old["all_s"]) else ""
            apart = "slower" if min(line["all_s"]) > max(old["all_s"]) else apart
            ratio = line["median_s"] / old["median_s"]
            seconds = (f"{old['median_s']:.3f}", f"{line['median_s']:.3f}", f"{ratio:.2f}")
            memory = f"{line['memory_mb'] - old['memory_mb']:+,.0f}"
            rows.append((title(line), line["engine"], *seconds, apart, memory))
    if not rows:
        raise InputError("the two files have no case, engine and shape in common; there is nothing to compare")
    notes = [
        f"\nThe two are of different {what}: {old} and {new}."
        for what in ("cpu", "threads", "commit")
        if (old := first[0]["stamp"].get(what)) != (new := second[0]["stamp"].get(what))
    ]
    alone = len(first) + len(second) - 2 * len(rows)
    notes += [f"\nResults in one of the two files only: {alone}."] if alone else []
    return table(("case", "engine", "A", "B", "B / A", "beyond noise", "MB"), rows) + "".join(notes)


def require_matplotlib() -> None:
    """Raises `BackendError` where plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError("--plot needs matplotlib, not installed here; run: pip install 'xglm[bench]'")


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draws results into a file whose ending says how, as in `.svg`: costs that grow if there are some, else bars."""
    import matplotlib

    found = growths(lines)
    with matplotlib.rc_context(
        {"svg.hashsalt": "xglm", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    ):
        figure = _growth_figure(found) if found else _bar_figure(lines)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)


def _bar_figure(lines: Sequence[Line]) -> Any:
    """A panel for each case: a bar for each engine, its range, and the machine's limit."""
    from matplotlib.figure import Figure

    panels = _grouped(lines, key)
    engines = list(dict.fromkeys(line["engine"] for line in lines))
    figure = Figure(figsize=(7, sum(0.5 + 0.22 * len(panel) for panel in panels)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=[2 + len(panel) for panel in panels])[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        medians = np.array([line["median_s"] for line in panel])
        ranges = np.array(
            [[line["median_s"] - min(line["all_s"]), max(line["all_s"]) - line["median_s"]] for line in panel]
        )
        colors = [f"C{engines.index(line['engine'])}" for line in panel]
        places = np.arange(len(panel))[::-1]
        axes.barh(places, medians, xerr=ranges.T, color=colors, height=0.7, error_kw={"linewidth": 0.8})
        axes.set_yticks(places, [line["engine"] for line in panel])
        axes.set_title(f"{title(panel[0])} [s]", loc="left", fontsize=9)
        if limit := panel[0]["limit_s"]:
            axes.axvline(limit, color="black", linewidth=0.8, linestyle=":")
            axes.text(limit, len(panel) - 0.5, " limit", fontsize=7, va="bottom")
        axes.spines["right"].set_visible(False)
    return figure


def _growth_figure(found: Sequence[Growth]) -> Any:
    """A panel for each number that costs grow with: points, and the fits as lines."""
    from matplotlib.figure import Figure

    panels = [(name, [growth for growth in found if growth[0] == name]) for name in _SIZES]
    panels = [(name, inside) for name, inside in panels if inside]
    figure = Figure(figsize=(7, 2.6 * ((len(panels) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (name, inside) in zip(grid, panels, strict=False):
        for number, (_, points, coefficients) in enumerate(inside):
            sizes = [point[name] for point in points]
            smooth = np.linspace(0, sizes[-1], 100)
            axes.plot(sizes, [point["median_s"] for point in points], "o", color=f"C{number}", markersize=3)
            label = f"{points[0]['case']}, {points[0]['engine']}"
            axes.plot(smooth, np.polyval(coefficients, smooth), color=f"C{number}", linewidth=1, label=label)
        axes.set_xlabel({"new": "new tokens"}.get(name, name))
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, frameon=False)
        axes.spines["right"].set_visible(False)
    return figure
