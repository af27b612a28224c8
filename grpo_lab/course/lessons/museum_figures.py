"""The figures of the bug museum: its exhibits, and collapsed runs beside five healthy ones."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from grpo_lab.course.lessons.museum import EXHIBITS, HEALTHY, late, recorded
from grpo_lab.course.recorded import RecordedRun, recorded_runs
from grpo_lab.training.figures import COLOURS

PANELS = {
    "reward": ("reward", COLOURS["reward"]),
    "kl": ("KL, nats per token", COLOURS["kl"]),
    "entropy": ("entropy, nats", COLOURS["entropy"]),
    "completions/mean_length": ("length, tokens", COLOURS["length"]),
    "clip_ratio/region_mean": ("share clipped", "#56B4E9"),
    "grad_norm": ("gradient norm", "#000000"),
}
COLLAPSES = {
    "learning rate": "collapse-learning-rate",
    "sign of the KL": "collapse-wrong-sign-kl",
}
SIGNS = {
    "grad_norm": ("gradient norm", "#000000"),
    "kl": ("KL, nats per token", COLOURS["kl"]),
    "entropy": ("entropy, nats", COLOURS["entropy"]),
    "completions/mean_length": ("length, tokens", COLOURS["length"]),
    "reward": ("reward", COLOURS["reward"]),
    "frac_reward_zero_std": ("share of dead groups", COLOURS["zero_std"]),
}


def draw_all(figure) -> str:
    """Draw loss and reward of all twelve runs and of the healthy run."""
    panels = figure.subplots(1, 2)
    for exhibit in (*EXHIBITS, HEALTHY):
        rows, well = recorded(exhibit).metrics, exhibit == HEALTHY
        style = {"color": "black", "linewidth": 2.5, "zorder": 3} if well else {"color": "#999999", "linewidth": 1}
        for panel, name in zip(panels, ("loss", "reward"), strict=True):
            panel.plot([r["step"] for r in rows], [r[name] for r in rows], label=HEALTHY if well else None, **style)
    panels[0].set(ylabel="loss", xlabel="optimizer step", ylim=(-0.1, 0.3))
    panels[1].set(ylabel="mean reward", xlabel="optimizer step", ylim=(0, 1))
    panels[1].legend(frameon=False, loc="lower right")
    _tidy(figure, bottom=0.16, top=0.95, wspace=0.25)
    ends = {e: late(recorded(e).metrics, "reward") for e in (HEALTHY, *EXHIBITS)}
    as_good = sum(ends[e] >= ends[HEALTHY] - 0.05 for e in EXHIBITS)
    return (
        f"Thirteen runs, {len(EXHIBITS)} with a bug. Mean reward of the last three rollouts: healthy "
        f"{ends[HEALTHY]:.2f};\n{as_good} of the {len(EXHIBITS)} end at most 0.05 below it, "
        f"{sum(ends[e] > ends[HEALTHY] for e in EXHIBITS)} even above it."
    )


def draw_exhibit(figure, exhibit: str, look: str = "curves") -> str:
    """Draw the exhibit's curves beside those of the healthy run, or its samples."""
    return draw_curves(figure, exhibit) if look == "curves" else draw_samples(figure, exhibit, look)


def draw_curves(figure, exhibit: str) -> str:
    """Draw six metrics against the step; the healthy run is dashed."""
    ours, healthy = recorded(exhibit).metrics, recorded(HEALTHY).metrics
    words = []
    for panel, (name, (label, colour)) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        panel.plot([r["step"] for r in healthy], [r[name] for r in healthy], "--", color="#777777", linewidth=1.2)
        panel.plot([r["step"] for r in ours], [r[name] for r in ours], color=colour, linewidth=1.8)
        panel.set_title(label, fontsize=10, loc="left")
        panel.set_ylim(min(0.0, *(r[name] for r in ours)), 1.15 * max(r[name] for r in (*ours, *healthy)))
        words.append(f"{label.split(',')[0]} {late(ours, name):.2f} ({late(healthy, name):.2f})")
    for panel in figure.axes[:3]:
        panel.set_xticks([])
    for panel in figure.axes[3:]:
        panel.set_xlabel("optimizer step")
    _tidy(figure, bottom=0.12, top=0.92, wspace=0.25, hspace=0.3)
    ends = [recorded(e).info["after"] for e in (exhibit, HEALTHY)]
    right = [f"{a['eval/pass@1']:.0%} ({a['eval/pass@1_low']:.0%} to {a['eval/pass@1_high']:.0%})" for a in ends]
    first, second = ", ".join(words[:3]), ", ".join(words[3:])
    return (
        f"Exhibit {exhibit}, solid; the healthy run dashed and in brackets. Last three rollouts:\n"
        f"{first},\n{second}.\nRight on held-out problems, by the right reward: {right[0]}; healthy {right[1]}."
    )


def draw_samples(figure, exhibit: str, look: str) -> str:
    """Draw two groups of the first or the last rollout, with rewards and advantages."""
    steps = {row["step"] for row in recorded(exhibit).completions}
    step = min(steps) if "first" in look else max(steps)
    rows = [row for row in recorded(exhibit).completions if row["step"] == step]
    groups = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    words = [f"Exhibit {exhibit}, step {step}."]
    for left, group in zip((0.04, 0.53), groups, strict=True):
        figure.text(left, 0.9, f"{group[0]['prompt']}", family="monospace", fontsize=12, weight="bold")
        figure.text(left + 0.2, 0.9, "reward   advantage", fontsize=10)
        for line, row in enumerate(group):
            y = 0.81 - 0.1 * line
            colour = "#0072B2" if row["advantage"] > 0 else "#D55E00" if row["advantage"] < 0 else "#555555"
            figure.text(left, y, _short(row["completion"]), family="monospace", fontsize=12)
            figure.text(left + 0.2, y, f"{row['reward']:.0f}       {row['advantage']:+.2f}", fontsize=11,
                        family="monospace", color=colour)  # fmt: skip
        wins, kinds = sum(row["reward"] == 1 for row in group), len({row["completion"] for row in group})
        words.append(f"{group[0]['prompt']} {len(group)} completions, {kinds} different ones; {wins} earn 1.")
    return "\n".join(words)


def _short(text: str) -> str:
    return text if len(text) <= 16 else f"{text[:15]}…"


def band(runs: Sequence[RecordedRun], name: str, width: float = 5.0) -> tuple[list[float], list[float]]:
    """Return mean minus and plus `width` standard deviations of a metric over several runs, at each step.

    With five runs, one more of their kind is outside 5 standard deviations at about one step in a hundred.
    """
    steps = [[row[name] for row in rows] for rows in zip(*(run.metrics for run in runs), strict=True)]
    middle, spread = [mean(values) for values in steps], [width * stdev(values) for values in steps]
    low = [m - s for m, s in zip(middle, spread, strict=True)]
    return low, [m + s for m, s in zip(middle, spread, strict=True)]


def leaves(values: Sequence[float], low: Sequence[float], high: Sequence[float], stay: int = 3) -> int | None:
    """Return the first step (from 1) from which `stay` values in a row lie outside the band; None if there is none.

    >>> leaves([1.0, 5.0, 1.0, 5.0, 5.0, 5.0], [0.0] * 6, [2.0] * 6)
    4
    """
    outside = [not a <= v <= b for v, a, b in zip(values, low, high, strict=True)]
    return next((i + 1 for i in range(len(outside) - stay + 1) if all(outside[i : i + stay])), None)


def draw_collapse(figure, run: str) -> str:
    """Draw a collapsed run over the band of five healthy pocket runs; a line marks where it leaves the band."""
    (ours,), healthy = recorded_runs(COLLAPSES[run]), recorded_runs("pocket")
    first = {}
    for panel, (name, (label, colour)) in zip(figure.subplots(2, 3).flat, SIGNS.items(), strict=True):
        values, (low, high) = [row[name] for row in ours.metrics], band(healthy, name)
        most = 1.0 if name in ("reward", "frac_reward_zero_std") else math.inf
        low, high = [max(0.0, x) for x in low], [min(most, x) for x in high]  # the possible range
        steps = range(1, len(values) + 1)
        panel.fill_between(steps, low, high, color="#bbbbbb", alpha=0.6, linewidth=0)
        panel.plot(steps, values, color=colour, linewidth=1.6)
        if (left := leaves(values, low, high)) is not None:
            first[label.split(",")[0]] = left
            panel.axvline(left, color="#777777", linestyle=":")
        panel.set_title(label, fontsize=10, loc="left")
        panel.set_ylim(1.1 * min(0.0, *values), 1.15 * max(*values, *(r[name] for run in healthy for r in run.metrics)))
    for panel in figure.axes[:3]:
        panel.set_xticks([])
    for panel in figure.axes[3:]:
        panel.set_xlabel("optimizer step")
    _tidy(figure, bottom=0.12, top=0.92, wspace=0.25, hspace=0.3)
    after = ours.info["after"]["eval/pass@1"]
    order = ", ".join(f"{name} {step}" for name, step in sorted(first.items(), key=lambda item: item[1]))
    return (
        f"Right on held-out problems: {ours.info['before']['eval/pass@1']:.0%} before, {after:.0%} after.\n"
        f"First step outside the band of five healthy seeds, three steps in a row:\n{order}.\n{ours.label}"
    )


def _tidy(figure, **margins) -> None:
    figure.subplots_adjust(left=0.08, right=0.98, **margins)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
        panel.locator_params(axis="y", nbins=3)  # drawing ticks takes most of the time of a redraw
