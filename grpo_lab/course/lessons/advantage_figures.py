"""The figures of notebook 04; each function draws into a figure and describes it in words."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from grpo_lab.algorithm.advantages import all_equal, group_advantages
from grpo_lab.course.lessons.advantages import (
    coin_rewards,
    dead_share,
    expected_push,
    final_reward,
    plain_advantages,
    recorded_by_k,
    shares_by_right_answers,
)
from grpo_lab.course.recorded import RecordedRun
from grpo_lab.training.evaluation import wilson_interval
from grpo_lab.training.figures import COLOURS, running_mean

RIGHT, WRONG, DARK = COLOURS["reward"], "#BBC4CC", "#5A6670"
DEAD, PALE = COLOURS["zero_std"], "#F6DDA8"
PUSHES = {
    "GRPO": {"color": DEAD, "linestyle": "-", "linewidth": 2.2},
    "Dr. GRPO": {"color": RIGHT, "linestyle": "--", "linewidth": 2.2},
    "RLOO": {"color": "black", "linestyle": ":", "linewidth": 2.2},
}
COIN = {"color": "black", "linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 3.5,
        "label": "if all were equally hard"}  # fmt: skip
SHOWN = 100  # groups that are drawn one by one, so that a column is one per cent


def ground_of_groups(figure: Figure) -> None:
    """Draw what does not depend on K and p in `draw_groups`."""
    columns = figure.add_axes((0.075, 0.585, 0.9, 0.29))
    advantages, dead, noise = (figure.add_axes((left, 0.105, 0.235, 0.31)) for left in (0.075, 0.41, 0.74))
    columns.set(xlim=(0, SHOWN), ylim=(0, 1), xticks=[0, 100], yticks=[0, 0.5, 1], ylabel="share right")
    columns.tick_params(axis="x", pad=12, length=0)
    columns.spines[:].set_visible(False)
    columns.set_xlabel("groups, sorted by their right answers;  × marks a dead one", labelpad=-11)
    columns.scatter([0.8, 13.8, 26.8, 39.8], [1.11] * 4, s=55, marker="s", c=[RIGHT, WRONG, DEAD, PALE], clip_on=False)
    for n, word in enumerate(("right", "wrong", "all right", "all wrong", "- - -  p, about which the means scatter")):
        columns.text(13 * n + 2.2, 1.075, word, fontsize=10)

    _ground_of_histogram(advantages)
    dead.set(title="Dead groups", xlabel="p, chance of a right answer", ylabel="share of groups")
    dead.set(xlim=(0, 1), ylim=(0, 1.05), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    noise.set(title="Noise of the baseline", xlabel="K, completions per group", ylabel="std of the group's mean")
    noise.set(xlim=(0, 66), ylim=(0, 0.4), xticks=[2, 32, 64], yticks=[0, 0.2, 0.4])
    noise.text(34, 0.37, "√(p (1 − p) / K)", ha="center", va="top", fontsize=10)  # not LaTeX, which is slow
    _tidy(advantages, dead, noise)


def _ground_of_histogram(panel) -> None:
    panel.set(title="Advantages", xlabel="advantage (±4: and beyond)", ylabel="share of completions")
    panel.set(xlim=(-4.3, 4.3), ylim=(0, 1.2), xticks=[-4, -2, 0, 2, 4], yticks=[0, 0.5, 1])
    for x, word, colour in ((-2.7, "wrong", DARK), (0, "dead", "#8A5A00"), (2.7, "right", RIGHT)):
        panel.text(x, 1.07, word, color=colour, ha="center", fontsize=10)


def draw_groups(figure: Figure, K: int, p: float) -> str:
    """Draw 100 groups, their advantages, the share of dead groups, and the noise of the baseline."""
    columns, advantages, dead_groups, noise = figure.axes
    rewards = coin_rewards(K, p)
    dead, means = all_equal(rewards).float().mean().item(), rewards.mean(1)
    _draw_columns(columns, rewards[:SHOWN], p)
    _draw_histogram(advantages, rewards)

    ps, Ks = np.linspace(0, 1, 101), np.arange(2, 65)
    dead_groups.fill_between(ps, dead_share(ps, K), color=PALE)
    dead_groups.plot(ps, dead_share(ps, K), color=DEAD, linewidth=2.2)
    dead_groups.plot(p, dead, "o", color="black", markersize=6)
    dead_groups.text(0.5, 0.93, "pᴷ + (1 − p)ᴷ", ha="center", va="top", fontsize=10)
    noise.plot(Ks, np.sqrt(p * (1 - p) / Ks), color=RIGHT, linewidth=2.2)
    noise.plot(K, means.std(), "o", color="black", markersize=6)
    low, high = wilson_interval(dead, len(rewards))
    square = group_advantages(rewards).square().mean()
    return (
        f"K = {K}, p = {p:.2f}: dead groups {dead_share(p, K):.3f} by the formula, {dead:.3f} of {len(rewards)} drawn "
        f"(95 %: {low:.3f} to {high:.3f})\n"
        f"baseline {means.mean():.2f} ± {means.std():.3f}, by the formula ± {math.sqrt(p * (1 - p) / K):.3f}; "
        f"mean square of the advantages {square:.2f}"
    )


def _draw_columns(panel, rewards: Tensor, p: float) -> None:
    # columns sorted by right answers, right ones below: their edge is the group's mean
    K, right = rewards.shape[1], rewards.sum(1).sort().values
    is_dead = (right == 0) | (right == K)
    codes = (torch.arange(K)[:, None] < right).long() + 2 * is_dead  # 0 wrong, 1 right, 2 and 3 the same in dead groups
    paint = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (WRONG, RIGHT, PALE, DEAD)])
    high, wide = max(2, 128 // K), 7
    pixels = paint[codes].repeat_interleave(high, 0).repeat_interleave(wide, 1)
    pixels[:, ::wide] = 255
    if K <= 32:
        pixels[::high] = 255
    panel.imshow(pixels.numpy().astype(np.uint8), origin="lower", extent=(0, len(right), 0, 1), aspect="auto",
                 interpolation="nearest")  # fmt: skip
    panel.axhline(p, color="black", linewidth=1, linestyle="--")
    panel.plot(np.flatnonzero(is_dead) + 0.5, np.full(int(is_dead.sum()), -0.06), "x", color="#8A5A00", markersize=3.5,
               clip_on=False)  # fmt: skip
    title = f"100 prompts, K = {K} answers each: {int(is_dead.sum())} of them teach nothing"
    panel.text(0, 1.22, title, fontsize=12, fontweight="bold")


def _draw_histogram(panel, rewards: Tensor) -> None:
    advantages, edges = group_advantages(rewards), np.arange(-4.25, 4.3, 0.5)
    dead, below = all_equal(rewards)[:, None].expand_as(rewards), np.zeros(len(edges) - 1)
    for chosen, colour in ((dead, DEAD), (~dead & (rewards > 0), RIGHT), (~dead & (rewards == 0), DARK)):
        counts, _ = np.histogram(advantages[chosen].clamp(-4, 4), edges)
        share = counts / rewards.numel()
        panel.stairs(below + share, edges, baseline=below, fill=True, color=colour)
        below = below + share


def ground_of_difficulty(figure: Figure) -> None:
    """Draw what does not depend on K in `draw_difficulty`."""
    push, weight = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.97, bottom=0.17, top=0.88, wspace=0.25)
    p = np.linspace(0.02, 0.98, 97)
    (true,) = push.plot(p, p * (1 - p), color="#CCCCCC", linewidth=7, label="true gradient, $p(1-p)$")
    lines = [Line2D([], [], **style, label=name) for name, style in PUSHES.items()]
    push.legend(handles=[true, *lines], frameon=False, fontsize=9, ncols=2, loc="upper center")
    push.set(title="Expected push of a prompt", ylabel="push on the policy's weight", ylim=(0, 0.62), xlim=(0, 1))
    weight.set(title="What dividing by the std does to it", ylabel="GRPO / Dr. GRPO", ylim=(0, 8), xlim=(0, 1))
    for panel in (push, weight):
        panel.set_xlabel("p, chance of a right answer")
    _tidy(push, weight)


def draw_difficulty(figure: Figure, K: int) -> str:
    """Draw the expected push of prompts of each difficulty under GRPO, Dr. GRPO and RLOO, and the effect of the std."""
    push, weight = figure.axes
    p = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    pushes = {
        "GRPO": expected_push(p, K),
        "Dr. GRPO": expected_push(p, K, scale="none"),
        "RLOO": expected_push(p, K, baseline="leave-one-out", scale="none"),
    }
    for name, style in PUSHES.items():
        push.plot(p, pushes[name], **style)
    ratio = pushes["GRPO"] / pushes["Dr. GRPO"]
    weight.plot(p, ratio, color=DEAD, linewidth=2.2)
    weight.axhline(ratio[48], color="#999999", linewidth=0.8, linestyle=":")
    at = {x: round((x - 0.02) * 100) for x in (0.05, 0.5)}
    parts = (f"{name} {values[at[0.5]]:.3f}" for name, values in pushes.items())
    return (
        f"K = {K}, at p = 0.50: true gradient 0.250, {', '.join(parts)}\n"
        f"the std multiplies the push by {ratio[at[0.5]]:.2f} at p = 0.50 and by {ratio[at[0.05]]:.2f} at p = 0.05: "
        f"{ratio[at[0.05]] / ratio[at[0.5]]:.2f} times the weight for the hard prompt"
    )


def draw_std_eps(figure: Figure) -> str:
    """Draw the advantages of a clear signal, a faint one, and none, by the plain formula, against std_eps."""
    cases = {
        "rewards 1, 0, 0, 1": (torch.tensor([[1.0, 0.0, 0.0, 1.0]]), RIGHT, "-"),
        "the same times 0.001": (torch.tensor([[0.001, 0.0, 0.0, 0.001]]), "#009E73", "--"),
        "no signal: seven times 0.7": (torch.full((1, 7), 0.7), DEAD, "-"),
    }
    panel = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.18, top=0.95)
    eps = 10.0 ** np.arange(-12, 0.01, 0.25)
    values = {
        name: [plain_advantages(r, float(e)).abs().max().item() for e in eps] for name, (r, _, _) in cases.items()
    }
    for name, (_, colour, line) in cases.items():
        panel.semilogx(eps, values[name], line, color=colour, linewidth=2.2, label=name)
    panel.axvline(1e-4, color="black", linewidth=0.8, linestyle=":")
    panel.text(1.2e-4, 1.02, "1e-4", fontsize=9)
    panel.set(xlabel="std_eps, in the units of the reward", ylabel="largest |advantage|", ylim=(0, 1.12))
    panel.legend(frameon=False, loc=(0.02, 0.36), fontsize=9)
    _tidy(panel)
    rows = ((e, *(values[name][round(4 * (12 + math.log10(e)))] for name in cases)) for e in (1e-12, 1e-8, 1e-4, 1e-2))
    return "\n".join(f"std_eps {e:.0e}: clear signal {a:.2f}, faint {b:.2f}, none {c:.4f}" for e, a, b, c in rows)


def ground_of_rollouts(figure: Figure, rewards: Tensor) -> None:
    """Draw what does not depend on the step in `draw_rollouts`: the axes, and the curves of the run [steps, P, K]."""
    K, steps = rewards.shape[2], range(1, len(rewards) + 1)
    counts, advantages, course = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.075, right=0.98, bottom=0.18, top=0.88, wspace=0.38)
    counts.set(title="Groups around this step", xlabel=f"right answers of {K}", ylabel="share of groups")
    counts.set(xlim=(-0.7, K + 0.7), ylim=(0, 1.15), xticks=range(0, K + 1, 2))
    counts.legend(handles=[Line2D([], [], **COIN)], frameon=False, fontsize=9, loc="upper center")
    _ground_of_histogram(advantages)
    course.plot(steps, running_mean(rewards.mean((1, 2)).tolist()), color=RIGHT, linewidth=2.2, label="reward")
    deads = [all_equal(r).float().mean().item() for r in rewards]
    course.plot(steps, running_mean(deads), "--", color=DEAD, linewidth=2.2, label="dead groups")
    course.set(title="The run", xlabel="optimizer step", ylabel="mean; share", xlim=(0, steps[-1] + 1), ylim=(0, 1.15))
    course.legend(frameon=False, fontsize=9, loc="upper center", ncols=2, columnspacing=1, handlelength=1.5)
    _tidy(counts, advantages, course)


def draw_rollouts(figure: Figure, rewards: Tensor, step: int) -> str:
    """Draw the groups of a run [steps, P, K] around a step: right answers per group, and advantages."""
    K, first, last = rewards.shape[2], max(1, step - 2), min(len(rewards), step + 2)
    window = rewards[first - 1 : last].flatten(0, 1)
    share, dead, p = shares_by_right_answers(window), all_equal(window).float().mean().item(), window.mean().item()
    counts, advantages, course = figure.axes
    bars = counts.bar(range(K + 1), share, color=[DEAD, *[RIGHT] * (K - 1), DEAD], width=0.8)
    for bar in (bars[0], bars[K]):
        bar.set(hatch="//", edgecolor="white")
    coin = [math.comb(K, c) * p**c * (1 - p) ** (K - c) for c in range(K + 1)]
    counts.plot(range(K + 1), coin, **COIN)
    _draw_histogram(advantages, window)
    course.axvspan(first - 0.5, last + 0.5, color="black", alpha=0.08, linewidth=0)
    return (
        f"steps {first} to {last}: mean reward {p:.2f}; {dead * len(window):.0f} of {len(window)} groups are dead; "
        f"were all prompts equally hard, {(coin[0] + coin[K]) * len(window):.1f} would be\n"
        f"shares of the groups with 0 to {K} right answers: {' '.join(f'{s:.2f}' for s in share)}"
    )


def draw_recorded(figure: Figure, runs: Mapping[int, Sequence[RecordedRun]]) -> str:
    """Draw dead groups and reward of recorded runs for each K; all have 128 completions per step."""
    dead, reward = (recorded_by_k(runs, name) for name in ("frac_reward_zero_std", "reward"))
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.87, bottom=0.17, top=0.88, wspace=0.25)
    for panel, curves in zip(panels, (dead, reward), strict=True):
        for n, (K, values) in enumerate(curves.items()):
            style = {"color": colormaps["cividis"](n / len(curves)), "marker": "os^Dv"[n], "markevery": (5 * n, 25)}
            panel.plot(range(1, len(values) + 1), values, **style, linewidth=2, markersize=5, label=f"K = {K}")
        panel.set(xlabel="optimizer step", ylim=(0, 1.05))
    panels[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[0].set(title="Dead groups", ylabel="share of groups")
    panels[1].set(title="Reward", ylabel="mean reward")
    _tidy(*panels)
    ends = {K: [final_reward(run) for run in seeds] for K, seeds in runs.items()}
    return "\n".join(
        f"K = {K:2}: dead groups {dead[K][0]:.2f} at the start, {dead[K][-1]:.2f} at the end; "
        f"reward {reward[K][0]:.2f} to {math.fsum(ends[K]) / len(ends[K]):.3f} "
        f"({len(ends[K])} seeds: {min(ends[K]):.3f} to {max(ends[K]):.3f})"
        for K in runs
    )


def _tidy(*panels) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(11)
