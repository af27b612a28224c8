"""The figures of notebook 09: sweeps over recorded runs, what a few seeds can show, and what an answer costs."""

from collections.abc import Sequence
from functools import cache

from grpo_lab.course.lessons.experiments import (
    BASE,
    SEEDS,
    T95,
    compare,
    measure,
    power,
    standard_experiments,
    sweep,
    verdict,
)
from grpo_lab.training.figures import running_mean

PALETTE = ("#D55E00", "#E69F00", "#56B4E9", "#009E73", "#0072B2")
LINES = ("--", "-.", (0, (5, 1)), ":", (0, (3, 1, 1, 1)))
ENTROPY, POINTS = "entropy at the end", 100

_sweep, _compare = cache(sweep), cache(compare)  # files are read once


@cache
def _curves(name: str) -> dict[str, list[float]]:
    # label -> the reward, averaged over seeds, then over neighbouring steps
    rewards = {label: [[row["reward"] for row in run.metrics] for run in runs] for label, runs in _sweep(name).items()}
    return {label: running_mean([sum(r) / len(r) for r in zip(*rows, strict=True)]) for label, rows in rewards.items()}


def draw_sweep(figure, sweep: str, compared: str) -> str:
    """Draw the mean reward over the seeds against the step (left), and the paired difference to the base (right)."""
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    curves = _curves(sweep)
    crowd = len(curves) > len(PALETTE)  # too many to tell apart: one style for all, and the right panel names them
    for i, (label, values) in enumerate(curves.items()):
        base = label == BASE[sweep]
        style = {"color": "#999999", "linewidth": 1.2} if crowd else {
            "color": PALETTE[i], "linestyle": LINES[i], "linewidth": 1.6
        }  # fmt: skip
        style |= {"color": "black", "linestyle": "-", "linewidth": 2.6, "zorder": 3} if base else {}
        name = label if base or not crowd else f"the {len(curves) - 1} others" if i == len(curves) - 1 else None
        left.plot(range(1, len(values) + 1), values, label=name, **style)
    left.set(xlabel="optimizer step", ylabel="mean reward", ylim=(0, 1.02))
    left.legend(title=sweep, frameon=False, fontsize=9, loc="lower right", ncols=1 if crowd else 2)
    rows = _compare(sweep, compared)
    unit, scale = ("nats", 1) if compared == ENTROPY else ("percentage points", POINTS)
    for y, (middle, low, high) in enumerate(rows.values()):
        sure = verdict(low, high) != "inconclusive"
        colour = "#0072B2" if sure else "#777777"
        right.plot([low * scale, high * scale], [y, y], color=colour, linewidth=2)
        right.plot(middle * scale, y, "o" if sure else "D", color=colour, markerfacecolor=colour if sure else "white")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(rows)), [f"{sweep} {label}" if sweep != "variant" else label for label in rows])
    right.invert_yaxis()
    base = BASE[sweep] if sweep == "variant" else f"{sweep} {BASE[sweep]}"
    right.set_xlabel(f"difference to {base}, {unit}")
    right.set_title(f"{compared}", fontsize=10, loc="left")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.15, top=0.92, wspace=0.32)
    level = sum(measure(run, compared) for run in _sweep(sweep)[BASE[sweep]]) / SEEDS
    words = [f"{compared}; {base}: {level * scale:.{2 if scale == 1 else 1}f}.",
             f"Differences in {unit}, 95 % intervals, {SEEDS} seeds, paired:"]  # fmt: skip
    digits = 3 if scale == 1 else 1
    words += [
        f"  {label:10} {middle * scale:+6.{digits}f}  ({low * scale:+.{digits}f} to {high * scale:+.{digits}f})  "
        f"{verdict(low, high)}"
        for label, (middle, low, high) in rows.items()
    ]
    return "\n".join(words)


_EXPERIMENTS = standard_experiments(2000)


def draw_power(figure, seeds: int, difference: float, spread: float) -> str:
    """Draw how often n seeds find a true difference, in percentage points, for each n; mark the chosen n.

    Where there is no difference: how often they find one all the same, above 0 or below.
    """
    panel = figure.subplots()
    numbers, shares = list(T95), power(difference, spread, _EXPERIMENTS)
    if difference == 0:
        means, stds = _EXPERIMENTS
        below = power(0.0, spread, (-means, stds))
        shares = [a + b for a, b in zip(shares, below, strict=True)]
    panel.plot(numbers, shares, color="#0072B2", marker="o", markersize=3)
    here = shares[numbers.index(seeds)]
    panel.plot([seeds, seeds, 0], [0, here, here], color="#D55E00", linestyle=":")
    panel.plot(seeds, here, "o", color="#D55E00", markersize=9)
    panel.set(xlabel="seeds", ylabel="share of experiments that are sure", ylim=(0, 1.05), xlim=(0, max(numbers) + 1))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.16, top=0.95)
    if difference == 0:
        return (
            f"No true difference, seeds varying by {spread:.1f} points: nothing to find.\n"
            f"{seeds} seeds: {here:.0%} of experiments come out sure all the same."
        )
    enough = next((str(n) for n, share in zip(numbers, shares, strict=True) if share >= 0.8), f"more than {max(T95)}")
    return (
        f"A true difference of {difference:.1f} points, seeds varying by {spread:.1f} points:\n"
        f"{seeds} seeds find it in {here:.0%} of experiments; for 80 % it takes {enough}."
    )


def draw_costs(figure, ks: Sequence[int], shares: Sequence[float], length: float, trained: Sequence[float]) -> str:
    """Draw the share of problems solved against sampled tokens per problem, for best-of-K and for trained models."""
    panel = figure.subplots()
    costs = [k * length for k in ks]
    panel.plot(costs, shares, color="#D55E00", marker="o", label="base model, best of K, with a verifier (live)")
    for k, x, y in zip(ks, costs, shares, strict=True):
        panel.annotate(f"K = {k}", (x, y), xytext=(0, -14), textcoords="offset points", fontsize=8, ha="center")
    panel.plot([length] * len(trained), trained, "^", color="#0072B2", label="after GRPO, one answer (recorded)")
    panel.set(xscale="log", xlabel="sampled tokens per problem", ylabel="share of problems solved", ylim=(0, 1.02))
    panel.set_xticks(costs, [f"{x:.0f}" for x in costs])
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, loc="lower right")
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.16, top=0.96)
    words = ", ".join(f"{k}: {share:.3f}" for k, share in zip(ks, shares, strict=True))
    return f"best of K, base model: {words}\nafter GRPO, one answer: {min(trained):.3f} to {max(trained):.3f}"
