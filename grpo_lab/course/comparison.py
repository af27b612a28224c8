"""Compare several runs: read their folders, join the seeds of a run, draw a figure, and describe it in words."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import islice
from os.path import abspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_lab.training.figures import running_mean
from grpo_lab.training.metrics import METRICS, JsonLines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Rows = Sequence[Mapping[str, Any]]
DEFAULT_METRICS = ("reward", "kl", "entropy", "completions/mean_length")
# Okabe and Ito, safe for colour-blind readers; without their yellow, which is too light for a line. Seven colours and
# four kinds of line have no common divisor: 28 runs look different.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", (0, (1, 1)))


def read_runs(folders: Sequence[str | Path]) -> dict[str, list[Rows]]:
    """Return the rows of metrics.jsonl by the name of the run, one list per seed.

    Folders with the same parent whose names differ only in `-seed0` are seeds of one run. A name is the shortest end of
    the path that no other run has.
    Raises: ValueError for a folder without metrics; it names the folder and what is in it.
    """
    given = list(
        dict.fromkeys(Path(abspath(folder)) for folder in folders)
    )  # a folder that is given twice is drawn once
    runs: dict[Path, list[Path]] = {}
    for folder in given:
        together = folder.parent / re.sub(r"(?<=.)[-_]seed[-_]?\d+$", "", folder.name)
        runs.setdefault(folder if together in given else together, []).append(folder)
    paths = {path if len(seeds) > 1 else seeds[0]: seeds for path, seeds in runs.items()}
    return {_tail(path, list(paths)): [_rows(seed) for seed in seeds] for path, seeds in paths.items()}


def _tail(path: Path, paths: Sequence[Path]) -> str:
    # return the shortest end of a path that no other path has
    tails = (path.parts[-deep:] for deep in range(1, len(path.parts) + 1))
    return str(Path(*next(tail for tail in tails if sum(p.parts[-len(tail) :] == tail for p in paths) == 1)))


def _rows(folder: Path) -> Rows:
    file = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}. Give the folder of a run, which holds metrics.jsonl.")
    if not file.is_file():
        names = sorted(path.name for path in islice(folder.iterdir(), 1000))
        inside = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        raise ValueError(f"there is no metrics.jsonl in {folder}; it holds {inside or 'nothing'}. Give a run's folder.")
    rows = [row for row in JsonLines(file).read() if isinstance(row, dict) and _number(row.get("step"))]
    if not rows:
        raise ValueError(f"{file} has no rows: no step of this run was logged.")
    return rows


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(seeds: Sequence[Rows], metric: str) -> list[tuple[float, float, float, float]]:
    """Return (step, mean over seeds, lowest seed, highest seed) at the steps that all seeds have.

    Each seed is first averaged over neighbouring rows (`running_mean`).
    """
    lines = []
    for rows in seeds:
        values = dict(sorted((row["step"], row[metric]) for row in rows if _number(row.get(metric))))
        lines.append(dict(zip(values, running_mean(list(values.values())), strict=True)))
    shared = [step for step in lines[0] if all(step in line for line in lines)]
    at = {step: [line[step] for line in lines] for step in shared}
    return [(step, math.fsum(values) / len(values), min(values), max(values)) for step, values in at.items()]


def comparison_figure(runs: Mapping[str, Sequence[Rows]], metrics: Sequence[str] = DEFAULT_METRICS) -> "Figure":
    """Draw one panel per metric and one line per run, against the step; shaded from the lowest to the highest seed.

    Made without pyplot, as `training_figure` is.
    Raises: ValueError for a metric that no run has, or for more runs than can be told apart.
    """
    from matplotlib.figure import Figure

    if len(runs) > (most := len(COLOURS) * len(LINES)):
        raise ValueError(f"{len(runs)} runs are too many to tell apart. Give at most {most}.")
    columns = min(2, len(metrics))
    rows, width = math.ceil(len(metrics) / columns), 4.6 * columns + 0.4  # inches
    labels = [_label(name) for name in runs]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    keys = max(1, min(4, int(width / (0.09 * longest + 0.7))))  # beside each other
    lines = sum(label.count("\n") + 1 for label in labels) / keys
    figure = Figure(figsize=(width, 2.9 * rows + 0.25 * lines + 0.2), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for panel, metric in zip(panels, metrics, strict=False):
        for i, seeds in enumerate(runs.values()):
            points = curve(seeds, metric)
            steps, middle, low, high = zip(*points, strict=True) if points else ((),) * 4
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
            panel.plot(steps, middle, **style, linewidth=1.8, label=labels[i], marker="o" if len(points) == 1 else None)
            if len(seeds) > 1 and points:
                panel.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if not any(len(line.get_xdata()) for line in panel.lines):
            raise ValueError(f"no run has the metric {metric!r}. There is {', '.join(logged(runs))}.")
        panel.set_title("\n".join(textwrap.wrap(_meaning(metric), 55)), fontsize=10)
        panel.set(ylabel=metric, xlabel="optimizer step")
        panel.tick_params(labelbottom=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        low, high = panel.get_ylim()
        panel.set_ylim(min(0.0, low), high + 0.05 * (high - min(0.0, low)))  # a constant line is not cut off
    for panel in list(figure.axes)[len(metrics) :]:
        panel.remove()
    figure.legend(figure.axes[0].lines, labels, loc="outside lower center", ncols=keys, frameon=False)
    return figure


def _label(name: str) -> str:
    # matplotlib reads text between dollar signs as a formula
    name = name.encode("utf-8", "replace").decode().replace("$", r"\$")
    return "\n".join(textwrap.wrap(name, 40))


def _meaning(metric: str) -> str:
    found = next((words for name, words in METRICS.items() if fnmatch(metric, name)), metric)
    return found[:1].upper() + found[1:].partition(";")[0]


def logged(runs: Mapping[str, Sequence[Rows]]) -> list[str]:
    """Return the metrics, except the step, for which some run has a number."""
    return sorted({k for seeds in runs.values() for rows in seeds for r in rows for k in r if _number(r[k])} - {"step"})


def summary(runs: Mapping[str, Sequence[Rows]], metrics: Sequence[str]) -> str:
    """Describe what `comparison_figure` draws: each run's steps and seeds, and its first and last reward."""
    lines = ["Lines: mean over up to 7 neighbouring rows and all seeds; shaded: from the lowest seed to the highest."]
    for name, seeds in runs.items():
        points, metric = next(((p, m) for m in ("reward", *metrics) if (p := curve(seeds, m))), ([], ""))
        many = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        if not points:
            lines.append(f"  {name}{many}: nothing to draw")
            continue
        (first, start, *_), (last, end, low, high) = points[0], points[-1]
        words = f"  {name}{many}, steps {first:g} to {last:g}: {metric} {start:.3g} at first, {end:.3g} at last"
        words += f" ({low:.3g} to {high:.3g})" if many else ""
        if ends := {rows[-1]["step"] for rows in seeds} - {last}:
            words += f"; beyond step {last:g}, up to {max(ends):g}, not all seeds have rows" if many else ""
        lacking = [m for m in metrics if not curve(seeds, m)]
        lines.append(words + (f"; no {', '.join(lacking)}" if lacking else ""))
    return "\n".join(lines)
