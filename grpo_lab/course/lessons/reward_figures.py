"""The figures of notebook 03; each function draws into a figure and describes it in words."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from grpo_lab.course.lessons.rewards import bradley_terry_loss
from grpo_lab.training.figures import COLOURS, running_mean

# colours from Okabe and Ito; the line styles differ too
PAID = {"uncapped": ("#D55E00", "-"), "capped": ("#E69F00", "--"), "exact": (COLOURS["reward"], "-.")}
LOG_2 = float(np.log(2))


def ground_of_bradley_terry(figure: Figure) -> None:
    """Draw what does not depend on the scores in `draw_bradley_terry`."""
    gaps = np.linspace(-8, 8, 161)
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.97, bottom=0.18, top=0.87, wspace=0.25)
    curves = (1 / (1 + np.exp(-gaps)), np.logaddexp(0, -gaps))
    names = (("Chance that the chosen one wins", "probability"), ("Loss", "nats"))
    for panel, curve, (title, label) in zip(panels, curves, names, strict=True):
        panel.plot(gaps, curve, color="#0072B2", linewidth=2.2)
        panel.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
        panel.set(title=title, ylabel=label, xlabel="score of the chosen − score of the rejected", xlim=(-8.2, 8.2))
        panel.set_xticks([-8, -4, 0, 4, 8])
    panels[0].set_ylim(-0.03, 1.05)
    panels[1].set_ylim(-0.2, 8.3)
    _tidy(*panels)


def draw_bradley_terry(figure: Figure, chosen: float, rejected: float) -> str:
    """Draw the probability of a choice under two scores, the loss, and its gradient by the scores."""
    scores = torch.tensor([chosen, rejected], requires_grad=True)
    loss = bradley_terry_loss(scores[:1], scores[1:])
    pull = -torch.autograd.grad(loss, scores)[0]
    gap = chosen - rejected
    chance = 1 / (1 + np.exp(-gap))
    for panel, here in zip(figure.axes, (chance, loss.item()), strict=True):
        panel.plot(gap, here, "o", color="black", markersize=7, clip_on=False)
    return (
        f"scores {chosen:+.1f} and {rejected:+.1f}: the chosen one wins with probability {chance:.2f}, "
        f"loss {loss.item():.2f} nats\n"
        f"the loss pulls the chosen score by {pull[0]:+.2f}, the rejected one by {pull[1]:+.2f}"
    )


def draw_reward_model(figure: Figure, losses: Sequence[float], hidden: Tensor, learned: Tensor, ideal: float) -> str:
    """Draw the loss of a reward model during training, and its scores against the annotator's taste.

    Args:
        losses: of each step, in nats per pair.
        hidden, learned: [N] the annotator's taste and the model's score of N answers.
        ideal: the loss of a model that knows the annotator's taste exactly.
    """
    course, scatter = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.97, bottom=0.17, top=0.88, wspace=0.25)
    course.plot(range(1, len(losses) + 1), losses, color="#0072B2", linewidth=0.8, alpha=0.4)
    course.plot(range(1, len(losses) + 1), running_mean(losses, 6), color="#0072B2", linewidth=2.2)
    for height, shift, words in ((LOG_2, 0.012, "a coin: log 2"), (ideal, -0.045, "if the taste is known exactly")):
        course.axhline(height, color="#555555", linewidth=1, linestyle="--")
        course.text(len(losses), height + shift, words, ha="right", fontsize=9)
    course.set(title="Learning from choices", xlabel="step of 64 pairs", ylabel="loss, nats per pair", ylim=(0, 0.85))

    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(hidden))
    scatter.plot(hidden.numpy() + jitter, learned, "o", color="#0072B2", alpha=0.25, markersize=4, markeredgewidth=0)
    values = hidden.unique()
    means = [learned[hidden == value].mean().item() for value in values]
    scatter.plot(values, means, "D-", color="black", markersize=5, linewidth=1.2, label="mean")
    scatter.set(title="Score and hidden taste", xlabel="the annotator's hidden taste", ylabel="the model's score")
    scatter.legend(frameon=False, loc="upper left")
    _tidy(course, scatter)
    together = torch.corrcoef(torch.stack([hidden, learned]))[0, 1]
    return (
        f"loss {np.mean(losses[:10]):.2f} in the first ten steps, {np.mean(losses[-10:]):.2f} in the last ten; a coin "
        f"{LOG_2:.2f}, who knows the taste {ideal:.2f}\n"
        f"score and hidden taste go together with a correlation of {together:.2f}"
    )


def draw_hacked(figure: Figure, runs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Draw the reward paid and the share of right answers against the step, for runs named as in PAID."""
    paid, meant = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.85, bottom=0.17, top=0.88, wspace=0.28)
    for panel, which in ((paid, 0), (meant, 1)):
        for name, curves in runs.items():
            colour, line = PAID[name]
            values = running_mean(curves[which], 2)
            panel.plot(range(1, len(values) + 1), values, line, color=colour, linewidth=2.2, label=name)
        panel.set(xlabel="optimizer step")
    meant.legend(frameon=False, title="paid by", loc="center left", bbox_to_anchor=(1, 0.5))
    paid.set(title="What is paid", ylabel="mean reward, log scale", yscale="log", ylim=(0.2, 60))
    paid.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    paid.set_yticks([], minor=True)
    meant.set(title="What was meant", ylabel="share of right answers", ylim=(0, 1.03))
    _tidy(paid, meant)

    def ends(values: Sequence[float]) -> str:
        return f"{np.mean(values[:3]):.2f} to {np.mean(values[-5:]):.2f}"

    return "\n".join(f"{name:9} paid {ends(p)}, right {ends(r)}" for name, (p, r) in runs.items())


def _tidy(*panels) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(11)
