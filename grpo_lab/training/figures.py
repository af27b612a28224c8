"""The figure of a training run."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# One colour for one quantity, everywhere; the palette of Okabe and Ito is safe for colour-blind readers.
COLOURS = {"reward": "#0072B2", "kl": "#D55E00", "entropy": "#009E73", "length": "#CC79A7", "zero_std": "#E69F00"}


def training_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> "Figure":
    """Reward, KL, entropy and length against the step, from the rows of metrics.jsonl.

    Faint: each row; strong: the mean of it and its neighbours; shaded: how far rewards within a group lie from their
    mean, cut at 0 and 1 where rewards seem to be shares. Made without pyplot, so that nothing is shown
    or kept open; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex=True)
    (reward, kl), (entropy, length) = panels

    _curve(reward, rows, "reward", COLOURS["reward"], "mean reward")
    _band(reward, rows, "reward", "reward_std", COLOURS["reward"], "± spread within a group")
    _curve(reward, rows, "frac_reward_zero_std", COLOURS["zero_std"], "share of groups that teach nothing", "--")
    reward.set(title="Reward", ylabel="reward; share of groups")
    if reward.lines:
        figure.legend(*reward.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _curve(kl, rows, "kl", COLOURS["kl"])
    kl.set(title="KL to the reference", ylabel="nats per token")
    if rows and not any("kl" in row for row in rows):
        kl.text(0.5, 0.5, "not computed: kl_coef = 0", ha="center", va="center", transform=kl.transAxes)
    _curve(entropy, rows, "entropy", COLOURS["entropy"])
    entropy.set(title="Entropy of the next token", ylabel="nats", xlabel="optimizer step")
    _curve(length, rows, "completions/mean_length", COLOURS["length"])
    length.set(title="Completion length", ylabel="tokens", xlabel="optimizer step")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        low, high = min(0.0, panel.get_ylim()[0]), panel.get_ylim()[1]
        panel.set_ylim(low, high + 0.05 * (high - low))
    return figure


def _curve(panel, rows, name: str, colour: str, label: str | None = None, line: str = "-") -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        panel.plot(steps, values, color=colour, linewidth=1.0, alpha=0.35)
        panel.plot(steps, running_mean(values), line, color=colour, linewidth=2.0, label=label)


def _band(panel, rows, name: str, spread: str, colour: str, label: str) -> None:
    points = [row for row in rows if row.get(name) is not None and row.get(spread) is not None]
    if not points:
        return
    middle, width = (running_mean([row[key] for row in points]) for key in (name, spread))
    low, high = ([m + sign * w for m, w in zip(middle, width, strict=True)] for sign in (-1, 1))
    # no two numbers between 0 and 1 have an std (n - 1) above 0.71
    if all(0 <= row[name] <= 1 and row[spread] < 0.71 for row in points):
        low, high = [max(0.0, y) for y in low], [min(1.0, y) for y in high]
    panel.fill_between([row["step"] for row in points], low, high, color=colour, alpha=0.12, linewidth=0, label=label)


def running_mean(values: Sequence[float], reach: int = 3) -> list[float]:
    """Each value averaged with up to `reach` neighbours on either side.

    >>> running_mean([0.0, 3.0, 6.0], reach=1)
    [1.5, 3.0, 4.5]
    """
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]
