"""Notebook 06: what a KL penalty costs, in closed form, in recorded runs, and in short live runs."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from grpo_lab import pocket
from grpo_lab.algorithm.kl import exact_kl
from grpo_lab.course.lessons.kl import REF, WORDS
from grpo_lab.course.recorded import RecordedRun
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.figures import COLOURS
from grpo_lab.training.trainer import GRPOTrainer

REWARDS = torch.tensor([0.0, 0.0, 0.5, 1.0, 0.0, 0.5, 1.0], dtype=torch.float64)


def optimum(beta: float) -> Tensor:
    """Return the logits of the policy that maximises E[r] - beta KL(pi || ref): pi = ref exp(r / beta) / Z."""
    return REF + REWARDS / beta


def gained(logits: Tensor) -> tuple[float, float]:
    """Return the policy's expected reward, and its KL to the reference in nats."""
    return (logits.softmax(-1) @ REWARDS).item(), exact_kl(logits, REF).item()


BEST = {"facecolor": COLOURS["reward"], "edgecolor": "black", "label": "best policy"}


def ground_of_beta(figure: Figure) -> None:
    """Draw what does not depend on beta in `draw_beta`: the reference, and the curve of all betas."""
    bars, curve = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.17, top=0.88, wspace=0.28)
    reference = bars.bar(torch.arange(7) - 0.2, REF.softmax(-1).tolist(), 0.4, color="white", edgecolor="black",
                         hatch="//", label="reference")  # fmt: skip
    bars.set(title="one word of seven", ylabel="probability", xlim=(-0.7, 6.7), ylim=(0, 1), xticks=range(7))
    bars.set_xticklabels([f"{word}\n{reward:g}" for word, reward in zip(WORDS, REWARDS.tolist(), strict=True)])
    bars.legend(handles=[reference, Patch(**BEST)], frameon=False, loc="upper right")
    rewards, kls = zip(*(gained(optimum(beta)) for beta in torch.logspace(-2, 1.5, 60).tolist()), strict=True)
    curve.plot(kls, rewards, color="black")
    curve.set(title="every β from 32 to 0.01", xlabel="KL to the reference, nats", ylabel="expected reward")
    curve.set(xlim=(-0.15, 3.1), ylim=(0, 1.05))
    for panel in (bars, curve):
        panel.spines[["top", "right"]].set_visible(False)


def draw_beta(figure: Figure, beta: float) -> str:
    """Draw the best policy for this beta, and mark it on the curve of all betas."""
    bars, curve = figure.axes
    best = optimum(beta)
    reward, kl = gained(best)
    bars.bar(torch.arange(7) + 0.2, best.softmax(-1).tolist(), 0.4, **BEST)
    curve.plot(kl, reward, "o", color=COLOURS["reward"], markersize=10)
    return (
        f"β = {beta:.2f}: the best policy earns {reward:.3f} at a KL of {kl:.3f} nats; "
        f"the reference earns {gained(REF)[0]:.3f}"
    )


def live_run(kl_coef: float, estimator: str = "k3", steps: int = 15) -> list[dict[str, Any]]:
    """Make some steps of GRPO on the pocket model with 8 problems times 4 completions; return the metrics of each."""
    model, tokenizer = pocket.load()
    config = GRPOConfig.preset(
        "pocket", kl_coef=kl_coef, kl_estimator=estimator, batch_size=8, num_generations_per_prompt=4, max_steps=steps,
        warmup_steps=0, lr_scheduler="constant", output_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about k1 in the loss is explained in the notebook
        trainer = GRPOTrainer(model, None, countdown, tokenizer, config, countdown_dataset(2048))
    return [record.metrics for record in trainer.steps()]


def draw_live(figure: Figure, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw KL and reward of short runs."""
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.17, top=0.88, wspace=0.25)
    lines = []
    for (name, rows), style in zip(runs.items(), ("-o", "--s", ":^"), strict=False):
        for panel, metric in zip(panels, ("kl", "reward"), strict=True):
            panel.plot([row["step"] for row in rows], [row[metric] for row in rows], style, color=COLOURS[metric],
                       markersize=4, label=name)  # fmt: skip
        last = {metric: sum(row[metric] for row in rows[-5:]) / 5 for metric in ("kl", "reward")}
        lines.append(f"{name}: in the last five steps KL {last['kl']:.2f} nats per token, reward {last['reward']:.2f}")
    for panel, title, unit in zip(
        panels, ("KL to the reference", "reward"), ("nats per token", "share right"), strict=True
    ):
        panel.set(title=title, xlabel="optimizer step", ylabel=unit, xticks=range(1, len(rows) + 1, 2))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    return "\n".join(lines)


class Sweep(NamedTuple):
    """The recorded runs of one beta, smoothed."""

    runs: list[RecordedRun]
    reward: list[float]
    """Mean over the seeds, step by step, and over ten steps on either side; at the start over as many as there are."""
    kl: list[float] | None
    """Likewise, in nats per token; None where beta is 0: no reference, nothing computed."""


def sweep(runs: Sequence[RecordedRun]) -> Sweep:
    """Return the mean over the seeds of each beta."""

    def mean(name: str) -> list[float]:
        values = [sum(rows) / len(rows) for rows in zip(*([m[name] for m in r.metrics] for r in runs), strict=True)]
        windows = (values[max(0, i - 10) : i + min(i, 10) + 1] for i in range(len(values)))
        return [sum(window) / len(window) for window in windows]

    return Sweep(list(runs), mean("reward"), mean("kl") if "kl" in runs[0].metrics[0] else None)


def ground_of_sweep(figure: Figure, sweeps: Mapping[str, Sweep]) -> None:
    """Draw reward against the step, and reward against KL, for every beta, in pale colours with labels at the right."""
    curve, plane = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.09, right=0.96, bottom=0.17, top=0.82, wspace=0.25)
    figure.suptitle(next(iter(sweeps.values())).runs[0].label, fontsize=9)
    steps = max(len(one.reward) for one in sweeps.values())
    curve.set(title="reward", xlabel="optimizer step", ylabel="mean over seeds", ylim=(0, 1.05), xlim=(0, 1.18 * steps))
    curve.set_xticks(range(0, steps + 1, 20))
    plane.set(title="reward against KL", xlabel="KL to the reference, nats per token", ylim=(0, 1.05), xlim=(0, 0.4))
    below = 2.0
    for name, one in sorted(sweeps.items(), key=lambda item: -item[1].reward[-1]):
        _draw_run(curve, plane, one, color="#999999", linewidth=1.0)
        below = min(one.reward[-1] + 0.02, below - 0.06)  # labels must not overlap
        curve.text(1.01 * steps, below, f"β {name}", fontsize=9, va="center")
        if one.kl is not None:
            aside = {"0.1": (12, -22), "2": (8, -11)}.get(name, (6, 5))
            plane.annotate(f"β {name}", (one.kl[-1], one.reward[-1]), aside, fontsize=9, textcoords="offset points")
    for panel in (curve, plane):
        panel.spines[["top", "right"]].set_visible(False)


def _draw_run(curve, plane, one: Sweep, **style) -> None:
    curve.plot(range(1, len(one.reward) + 1), one.reward, **style)
    if one.kl is not None:
        plane.plot(one.kl, one.reward, **style)
        plane.plot(one.kl[-1], one.reward[-1], "o", color=style["color"])


def draw_sweep(figure: Figure, sweeps: Mapping[str, Sweep], beta: str) -> str:
    """Highlight the chosen beta among all of them."""
    one = sweeps[beta]
    _draw_run(*figure.axes, one, color=COLOURS["reward"], linewidth=2.5)
    if one.kl is None:
        figure.axes[1].text(0.2, 0.5, f"β {beta}: KL not computed", color=COLOURS["reward"], ha="center")
    right = ", ".join(f"{run.info['after']['eval/pass@1']:.0%}" for run in one.runs)
    drift = "not computed" if one.kl is None else f"{one.kl[-1]:.3f} nats per token"
    return (
        f"β = {beta}: right after the run, of sampled answers to 400 held-out problems:\n{right} (seeds 0 to "
        f"{len(one.runs) - 1}). At the end: KL {drift}, reward {one.reward[-1]:.2f}."
    )
