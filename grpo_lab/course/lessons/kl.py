"""Notebook 06: three estimators on seven words, where every expectation is computed exactly, and how k1 fails.

The estimates, the exact KL, truncation and scoring are the package's own; every gradient is computed by autograd.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from grpo_lab.algorithm.kl import exact_kl, kl_estimate
from grpo_lab.algorithm.logprobs import token_entropies, token_logprobs, truncate
from grpo_lab.training.figures import COLOURS

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "zebra")
REF = torch.tensor([3.0, 2.0, 1.5, 0.5, 0.0, -0.5, -1.5], dtype=torch.float64)
AWAY = torch.tensor([-1.6, 0.2, 0.6, 1.4, -0.4, 0.8, 1.0], dtype=torch.float64)
ESTIMATORS = ("k1", "k2", "k3")
LOOK = {"k1": ("#56B4E9", "s", "--"), "k2": ("#767676", "^", "-."), "k3": ("black", "o", "-")}


def policy(distance: float) -> Tensor:
    """Return logits [7] at this distance from the reference; at 0 they are the reference's."""
    return REF + distance * AWAY


def estimate(logits: Tensor, estimator: str) -> Tensor:
    """Return the estimate of the KL from each of the seven words, [7], with gradient."""
    logprobs, ref = logits.log_softmax(-1)[None], REF.log_softmax(-1)[None]
    return kl_estimate(logprobs, ref, torch.ones_like(ref, dtype=torch.bool), estimator=estimator)[0]


def value(logits: Tensor, estimator: str) -> tuple[float, float]:
    """Return the expected value of the estimate, and the standard deviation of a single one."""
    p, k = logits.softmax(-1), estimate(logits, estimator)
    mean = p @ k
    return mean.item(), (p @ (k - mean) ** 2).sqrt().item()


def gradient(logits: Tensor, estimator: str, place: str, *, corrected: bool = False) -> Tensor:
    """Return the expected gradient by the logits [7] of a penalty "in the loss" or "in the reward"; words come from pi.

    In the loss the estimate itself is differentiated, in the reward it multiplies the derivative of log pi.
    corrected: in the loss, times the ratio pi / pi.detach().
    """
    logits = logits.clone().requires_grad_()
    k, logprobs = estimate(logits, estimator), logits.log_softmax(-1)
    if corrected:
        k = k * (logprobs - logprobs.detach()).exp()
    term = k if place == "in the loss" else k.detach() * logprobs
    return torch.autograd.grad(logprobs.detach().exp() @ term, logits)[0]


def exact_gradient(logits: Tensor, *, reverse: bool = False) -> Tensor:
    """Return the gradient of KL(pi || ref), or of KL(ref || pi), by pi's logits [7]."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(exact_kl(REF, logits) if reverse else exact_kl(logits, REF), logits)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two gradients; 0 if one of them is 0."""
    return round((a @ b / (a.norm() * b.norm()).clamp(min=1e-9)).item(), 9) + 0.0  # and not -0.0


VALUE = {"color": COLOURS["kl"], "linewidth": 2, "label": "exact KL"}
SLOPE = {"color": COLOURS["kl"], "alpha": 0.5, "label": "exact"}


def ground_of_estimators(figure: Figure) -> None:
    """Draw what does not depend on any control in `draw_estimators`."""
    values, slopes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.17, top=0.88, wspace=0.25)
    values.set(title="value: mean ± std of one word", ylabel="nats", xticks=range(3), xticklabels=ESTIMATORS)
    values.set(xlim=(-0.5, 2.5), ylim=(-3, 5.5))
    values.legend(handles=[Line2D([], [], **VALUE)], frameon=False, loc="upper left")
    slopes.set(title="expected gradient", ylabel="by each logit", xticks=range(7), xticklabels=WORDS)
    slopes.set(xlim=(-0.7, 6.7), ylim=(-0.6, 0.6))
    marks = [Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, (c, m, _) in LOOK.items()]
    slopes.legend(handles=[Patch(**SLOPE), *marks], frameon=False, loc="lower right")
    for panel in (values, slopes):
        panel.spines[["top", "right"]].set_visible(False)


def draw_estimators(figure: Figure, place: str, distance: float) -> str:
    """Draw the value of each estimator (left) and its gradient (right), beside those of the exact KL."""
    values, slopes = figure.axes
    logits, x = policy(distance), torch.arange(7)
    kl, slope = exact_kl(logits, REF).item(), exact_gradient(logits)
    values.axhline(kl, **VALUE)
    slopes.bar(range(7), slope.tolist(), **SLOPE)
    lines = [f"penalty {place}; exact KL(π‖ref) {kl:.3f} nats"]
    for i, name in enumerate(ESTIMATORS):
        colour, marker, _ = LOOK[name]
        (mean, spread), ours = value(logits, name), gradient(logits, name, place)
        values.errorbar(i, mean, spread, fmt=marker, color=colour, capsize=5, markersize=8)
        slopes.plot(x + 0.2 * (i - 1), ours, marker, color=colour)
        lines.append(f"{name}: value {mean:.3f}, one word ± {spread:.2f}; gradient of length {ours.norm():.3f}, "
                     f"cosine {cosine(ours, slope):.2f} with the exact one")  # fmt: skip
    return "\n".join(lines)


class Descent(NamedTuple):
    """The effect of a penalty alone on the policy, step by step."""

    kl: list[float]
    """The exact KL to the reference, in nats."""
    entropy: list[float]
    """In nats."""
    logits: Tensor


def descend(
    estimator: str, *, top_p: float = 1.0, scored: str = "as sampled", uniforms: Tensor | None = None, steps: int = 150
) -> Descent:
    """Run gradient descent on the expected estimate, from `policy(1)`, without any reward.

    Args:
        top_p: the sampler's.
        scored: "as sampled", under the words that the sampler kept, or "full softmax".
        uniforms: [steps, N] numbers: N words are drawn at each step; None adds all words up exactly.
    """
    logits, kls, entropies = policy(1.0).requires_grad_(), [], []
    for step in range(steps + 1):
        kls.append(exact_kl(logits, REF).item())
        entropies.append(token_entropies(logits.detach()).item())
        if step == steps:
            break
        kept = truncate(logits.detach(), top_p=top_p)
        tokens = torch.arange(len(REF)) if kept is None else kept[kept >= 0]
        support = None if kept is None else tokens.expand(1, len(tokens), -1)
        seen = support if scored == "as sampled" else None
        both = [z.expand(1, len(tokens), -1) for z in (logits, REF)]
        sampler = token_logprobs(both[0].detach(), tokens[None], kept=support)[0].exp()
        if uniforms is not None:
            drawn = torch.searchsorted(sampler.cumsum(0), uniforms[step].double()).clamp(max=len(tokens) - 1)
            sampler = drawn.bincount(minlength=len(tokens)).double() / len(drawn)
        logprobs, ref = (token_logprobs(z, tokens[None], kept=seen) for z in both)
        penalty = kl_estimate(logprobs, ref, torch.ones_like(ref, dtype=torch.bool), estimator=estimator)[0]
        (slope,) = torch.autograd.grad(sampler @ penalty, logits)
        logits = (logits - 0.5 * slope).detach().requires_grad_()
    return Descent(kls, entropies, logits.detach())


def descents() -> dict[str, dict[str, Descent]]:
    """Run `descend` for four ways to compute the penalty and three estimators."""
    uniforms = torch.rand(150, 32, generator=torch.Generator().manual_seed(0))
    ways = {
        "exactly": {},
        "from 32 words": {"uniforms": uniforms},
        "top-p 0.9, scored as sampled": {"top_p": 0.9},
        "top-p 0.9, scored under the full softmax": {"top_p": 0.9, "scored": "full softmax"},
    }
    return {name: {k: descend(k, **way) for k in ESTIMATORS} for name, way in ways.items()}


def ground_of_descent(figure: Figure) -> None:
    """Draw what does not depend on the way in `draw_descent`."""
    kl, entropy = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.17, top=0.88, wspace=0.25)
    top = torch.tensor(float(len(REF))).log().item()
    entropy.axhline(top, color=COLOURS["entropy"], linewidth=1.5)
    entropy.text(2, top + 0.05, "all words alike", color=COLOURS["entropy"])
    kl.set(title="exact KL to the reference", ylabel="nats", ylim=(-0.03, 1.0))
    entropy.set(title="entropy", ylabel="nats", ylim=(0, 2.2))
    for panel in (kl, entropy):
        panel.set(xlabel="steps of descent on the penalty", xlim=(-7, 157))
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=c, linestyle=line, linewidth=2, label=name) for name, (c, _, line) in LOOK.items()]
    kl.legend(handles=handles, frameon=False, loc=(0.72, 0.14))


def draw_descent(figure: Figure, runs: Mapping[str, Mapping[str, Descent]], way: str) -> str:
    """Draw exact KL and entropy during gradient descent on the penalty."""
    (kl, entropy), lines = figure.axes, []
    for name, run in runs[way].items():
        colour, _, line = LOOK[name]
        kl.plot(run.kl, line, color=colour, linewidth=2)
        entropy.plot(run.entropy, line, color=colour, linewidth=2)
        lines.append(
            f"{name}: KL {run.kl[0]:.3f} → {run.kl[-1]:.3f} nats, entropy {run.entropy[0]:.2f} → {run.entropy[-1]:.2f}"
        )
    return "\n".join(lines)
