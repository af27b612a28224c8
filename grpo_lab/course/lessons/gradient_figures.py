"""The figures of notebook 01; each function describes its figure in words and rounded numbers."""

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from grpo_lab.course.lessons import gradients

STYLE = {  # colours from Okabe and Ito; the markers differ too
    "none": {"color": "#767676", "marker": "s"}, "global mean": {"color": "#E69F00", "marker": "^"},
    "group mean": {"color": "#56B4E9", "marker": "D"}, "leave-one-out": {"color": "#0072B2", "marker": "o"},
    "learned value": {"color": "#CC79A7", "marker": "v"},
}  # fmt: skip
VALUE = {"color": STYLE["learned value"]["color"], "linestyle": "--", "linewidth": 2.5, "label": "learned value"}


def _bare(*panels) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)


def _beside(panel, title: str, handles: list[Line2D]) -> None:
    panel.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title=title)


def _baselines(panel) -> None:
    _beside(panel, "baseline", [Line2D([], [], **style, label=name) for name, style in STYLE.items()])


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:+.3f}" for value in (values + 0.0).tolist())


def draw_enumeration(figure: Figure, policy: Tensor, rewards: Tensor, prompt: int) -> str:
    """Draw the gradient of each word if it were drawn, and the average of these."""
    pi, r = policy[prompt], rewards[prompt]
    pulls = r[:, None] * gradients.scores(pi)
    logits = pi.log().requires_grad_()
    (exact,) = torch.autograd.grad(logits.softmax(-1) @ r, logits)
    mean = pi @ pulls
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    figure.subplots_adjust(left=0.135, right=0.98, bottom=0.2, top=0.88, wspace=0.22)
    picture = left.imshow(pulls.numpy(), cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    left.set_xticks(range(7), gradients.WORDS, rotation=45)
    left.set_yticks(range(7), [f"{w} {p:.2f}" for w, p in zip(gradients.WORDS, pi.tolist(), strict=True)])
    left.set(title="r(w) · ∂ log π(w) / ∂ logit", xlabel="logit of", ylabel="word drawn, and π(w)")
    figure.colorbar(picture, ax=left, fraction=0.05, pad=0.03, ticks=[-1, 0, 1])
    right.bar(range(7), mean.tolist(), color="#56B4E9", width=0.7, label="rows weighted by π, added up")
    right.plot(range(7), exact.tolist(), "o", color="black", markersize=5, label="autograd through the sum")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(7), gradients.WORDS, rotation=45)
    right.set(title="∂J / ∂ logit, of this prompt")
    right.set_ylim(right.get_ylim()[0], right.get_ylim()[1] * 1.45)
    right.legend(frameon=False, fontsize=9, loc="upper right")
    _bare(right)
    return f"rows weighted by π, added up  {_numbers(mean)}\nautograd through the sum      {_numbers(exact)}"


def ground_of_baseline(figure: Figure, *, policy: Tensor, rewards: Tensor) -> None:
    """Draw what does not depend on b in `draw_baseline`."""
    all_b = torch.linspace(-1, 2, 31, dtype=torch.float64).tolist()
    curve, J = [curve_at(policy, rewards, b) for b in all_b], gradients.expected_reward(policy, rewards).item()
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.22, top=0.88, wspace=0.25)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xticks(range(7), gradients.WORDS, rotation=45)
    left.set(title="mean ± one standard deviation", ylabel="(r − b) ∂ log π / ∂ logit")
    left.set(xlim=(-0.7, 6.7), ylim=(-1.15, 1.15))
    right.plot(all_b, curve, color="#0072B2")
    right.axvline(J, color="#009E73", linestyle="--", linewidth=1)
    right.text(J + 0.05, max(curve) * 0.93, f"expected reward\n{J:.2f}", color="#009E73", va="top")
    right.set(title="variance, all logits together", xlim=(-1.15, 2.15), ylim=(0, max(curve) * 1.05))
    right.set(xlabel="baseline b, in units of reward", ylabel="variance of one draw")
    _bare(left, right)


def draw_baseline(figure: Figure, b: float, *, policy: Tensor, rewards: Tensor) -> str:
    """Draw the gradient from one draw with baseline b: its mean, its spread, and its variance for every b."""
    left, right = figure.axes
    mean, variance = gradients.variance_of_one_draw(policy, rewards, torch.tensor(b))
    J, best = gradients.expected_reward(policy, rewards).item(), gradients.best_baseline(policy, rewards).item()
    left.bar(
        range(7), mean.tolist(), color="#56B4E9", width=0.7, yerr=variance.sqrt().tolist(), ecolor="#555555", capsize=4
    )
    right.plot([b], [variance.sum().item()], "o", color="#D55E00", markersize=9)
    return (
        f"b = {b:.2f}: mean gradient {_numbers(mean)} (the same for every b)\n"
        f"variance {variance.sum():.3f}; at b = {J:.2f}, the expected reward, {curve_at(policy, rewards, J):.3f}; "
        f"the least, at b = {best:.2f}, {curve_at(policy, rewards, best):.3f}"
    )


def curve_at(policy: Tensor, rewards: Tensor, b: float) -> float:
    """Return the variance of one draw with baseline b, summed over the logits."""
    return gradients.variance_of_one_draw(policy, rewards, torch.tensor(b))[1].sum().item()


def stretched(noise: dict, baseline: str, K: int, seen: int = 0, equal: bool = True) -> tuple[float, float]:
    """Return variance per completion and half its 95 % interval, of gradients scaled to the exact length or not."""
    cell, factor = noise[baseline, seen], gradients.shrinkage(baseline, len(gradients.PROMPTS), K) ** (-2 * equal)
    return cell.variance * factor, 1.96 * cell.error * factor


def ground_of_noise(figure: Figure) -> None:
    """Draw what does not depend on any control in `draw_noise`."""
    panel = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.79, bottom=0.17, top=0.95)
    panel.set_xticks(range(len(gradients.GROUP_SIZES)), [str(K) for K in gradients.GROUP_SIZES])
    panel.set(xlabel="completions per prompt K", ylabel="variance of the gradient\n× completions")
    panel.set(xlim=(-0.3, len(gradients.GROUP_SIZES) - 0.7), ylim=(0, 0.45))
    _baselines(panel)
    _bare(panel)


def draw_noise(figure: Figure, spread: float, seen: str, lengths: str, *, noise: dict) -> str:
    """Draw the measured variance per completion of each baseline against K. noise[spread][K] comes from `measure`."""
    (panel,), table = figure.axes, {}
    for shift, baseline in enumerate(gradients.BASELINES):
        seen_by = int(seen) if baseline == "learned value" else 0
        cells = [stretched(noise[spread][K], baseline, K, seen_by, lengths == "equal") for K in gradients.GROUP_SIZES]
        table[baseline], errors = zip(*cells, strict=True)
        x = [n + 0.04 * (shift - 2) for n in range(len(cells))]  # side by side, so that none is hidden
        panel.errorbar(x, table[baseline], errors, **STYLE[baseline], capsize=2)
    hardest, *_, easiest = sorted(gradients.expected_reward(*gradients.world(spread)).tolist())
    head = f"The prompts expect rewards of {hardest:.2f} to {easiest:.2f}. Variance × completions at K ="
    lines = [f"{name:14}" + "".join(f"{value:7.2f}" for value in values) for name, values in table.items()]
    return "\n".join([head, " " * 14 + "".join(f"{K:7}" for K in gradients.GROUP_SIZES), *lines])


def ground_of_value(figure: Figure, *, history: gradients.History, prompt: int = 3) -> None:
    """Draw what does not depend on the rate in `draw_value`: the mean of each new group, and the expected reward."""
    truth, means = history.expected[:-1, 0, prompt].tolist(), history.group_means[:, 0, prompt].tolist()
    panel = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.72, bottom=0.17, top=0.95)
    fresh = panel.plot(means, "o", color=STYLE["group mean"]["color"], markersize=5, label="mean of the new group")
    exact = panel.plot(truth, color="black", linewidth=2, label="expected reward, exact")
    panel.set(xlabel="optimizer step", ylabel=f'reward for "{gradients.PROMPTS[prompt]}"')
    panel.set(xlim=(-2, len(truth) + 1), ylim=(-0.03, 1.03))
    _beside(panel, "one run, one prompt", [*fresh, *exact, Line2D([], [], **VALUE)])
    _bare(panel)


def draw_value(figure: Figure, rate: float, *, history: gradients.History, prompt: int = 3) -> str:
    """Draw a learned value, the expected reward that it lags behind, and the mean of each new group."""
    truth, means = history.expected[:-1], history.group_means
    values = gradients.follow(means, rate)
    figure.axes[0].plot(values[:, 0, prompt].tolist(), **VALUE)

    def off(guess: Tensor, steps: slice) -> str:
        return f"{(guess - truth)[steps].square().mean().sqrt():.2f}"

    first, rest = slice(0, 10), slice(10, None)
    return (
        f"Root mean square error over {truth.shape[1]} runs and all prompts:\n"
        f"learned value, rate {rate:.2f}:  steps 1-10 {off(values, first)}, later {off(values, rest)}\n"
        f"mean of the new group:     steps 1-10 {off(means, first)}, later {off(means, rest)}"
    )


def ground_of_training(figure: Figure) -> None:
    """Draw what does not depend on the offset in `draw_training`."""
    panel = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.79, bottom=0.17, top=0.95)
    panel.set(xlabel="optimizer step", ylabel="expected reward (offset taken off)", xlim=(-3, 63), ylim=(0.4, 1.02))
    _baselines(panel)
    _bare(panel)


def draw_training(figure: Figure, offset: float, *, curves: dict) -> str:
    """Draw the exact expected reward against the step. curves[baseline, offset]: [steps + 1, runs]."""
    (panel,), lines = figure.axes, []
    for baseline in gradients.BASELINES:
        runs = curves[baseline, offset]
        mean, half = runs.mean(1), 1.96 * runs.std(1) / runs.shape[1] ** 0.5
        panel.plot(mean.tolist(), **STYLE[baseline], markevery=10)
        panel.fill_between(range(len(mean)), (mean - half).tolist(), (mean + half).tolist(), alpha=0.2, linewidth=0,
                           color=STYLE[baseline]["color"])  # fmt: skip
        lines.append(
            f"{baseline:14}  step 20: {mean[20]:.2f} ± {half[20]:.2f}   step 60: {mean[60]:.2f} ± {half[60]:.2f}"
        )
    return "\n".join([f"rewards {offset:g} and {offset + 1:g}; mean of the runs and its 95 % interval", *lines])
