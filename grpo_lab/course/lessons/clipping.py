"""Notebook 05: one rollout used many times, the clip under sliders, and who counts how much in a mean.

The surrogate and its mean are the package's own; every gradient is computed by autograd.
"""

import tempfile
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from grpo_lab import pocket
from grpo_lab.algorithm.losses import aggregate, clipped_surrogate
from grpo_lab.course.recorded import RecordedRun
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.training.batches import MicroBatch
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.evaluation import wilson_interval
from grpo_lab.training.figures import COLOURS
from grpo_lab.training.trainer import GRPOTrainer

CUT, PLAIN = COLOURS["zero_std"], "#767676"  # CUT: tokens and groups without gradient
MEANS = ("sequence-mean", "token-mean", "constant")
SHORT, CONSTANT = 4, 64
"""Tokens of the short completion, and the constant of Dr. GRPO's mean, in the picture of the length bias."""
WIDEST = 2.5


class Reuse(NamedTuple):
    """One rollout of the pocket model, and the effect of many updates on it."""

    ratios: list[Tensor]
    """[N] importance ratio of each sampled token, after 0, 1, 2 … updates."""
    advantages: Tensor
    """[N] that of its completion."""
    cut: list[float]
    """Share of tokens without gradient at the first, second … update."""
    believed: list[float]
    """Mean of ratio times advantage after 0, 1, 2 … updates: the improvement that the old completions predict."""
    right: dict[int, tuple[float, float, float]]
    """After so many updates: share of right answers on held-out problems, and its 95 % interval."""


def reuse(clip_range: float, clip_range_high: float, *, updates: int = 16, look_at=(0, 1, 2, 4, 8, 16)) -> Reuse:
    """Sample 8 completions for each of 8 problems once, and make many updates on them."""
    model, tokenizer = pocket.load()
    config = GRPOConfig.preset(
        "pocket", kl_coef=0.0, clip_range=clip_range, clip_range_high=clip_range_high, num_iterations=updates,
        learning_rate=1.5e-3, lr_scheduler="constant", warmup_steps=0, output_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer = GRPOTrainer(model, None, countdown, tokenizer, config, countdown_dataset(2048))
    batch = trainer.collect(range(8))
    advantages = [part.advantages[:, None].expand_as(part.rollouts.completion_mask) for part in batch.parts]
    masks = [part.rollouts.completion_mask for part in batch.parts]
    result = Reuse([], _tokens(advantages, masks), [], [], {})
    for done in range(updates + 1):
        ratios = [_ratios(trainer, part) for part in batch.parts]
        result.ratios.append(_tokens(ratios, masks))
        result.believed.append(
            sum(
                aggregate(r * a, mask, total=len(batch.completions)).item()
                for r, a, mask in zip(ratios, advantages, masks, strict=True)
            )
        )
        if done in look_at:
            result.right[done] = _share_right(trainer)
        if done < updates:
            result.cut.append(trainer.update(batch)["clip_ratio/region_mean"])
            trainer.step += 1
    return result


def _ratios(trainer: GRPOTrainer, part: MicroBatch) -> Tensor:
    old = part.rollouts.logprobs if part.old_logprobs is None else part.old_logprobs
    now = trainer.components.models.logprobs(part.rollouts)
    return (now - old).where(part.rollouts.completion_mask, 0.0).exp()


def _tokens(values: list[Tensor], masks: list[Tensor]) -> Tensor:
    return torch.cat([v[mask] for v, mask in zip(values, masks, strict=True)])


def _share_right(trainer: GRPOTrainer, problems: int = 300) -> tuple[float, float, float]:
    # one answer to each, always with the same random numbers
    prompts = [row["prompt"] for row in countdown_dataset(problems, split="held-out")]
    uniforms = torch.rand(problems, trainer.config.max_new_tokens, generator=torch.Generator().manual_seed(0))
    share = sum(countdown(prompts, trainer.decode(trainer.sample(prompts, uniforms, 1)))) / problems
    return share, *wilson_interval(share, problems)


def surrogate_and_gradient(ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return each token's objective and its derivative by the log-probability. [N], [N] -> [N], [N]"""
    logprobs = ratios.log()[:, None].requires_grad_()
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    gain = clipped_surrogate(
        logprobs, torch.zeros_like(logprobs), advantages, mask, clip_range=low, clip_range_high=high
    )
    (slope,) = torch.autograd.grad(gain.sum(), logprobs)
    return gain.detach().squeeze(1), slope.squeeze(1)


WITHOUT_CLIP = {"color": PLAIN, "linestyle": "--", "linewidth": 1.2, "label": "unclipped"}
WITH_CLIP = {"color": "black", "linewidth": 2.4, "label": "clipped"}


def ground_of_clip(figure: Figure) -> None:
    """Draw what does not depend on any control in `draw_clip`."""
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.16, top=0.88, wspace=0.25)
    titles = ("objective  min(c A, clip(c) A)", "its gradient by log π, from autograd")
    for panel, title in zip(figure.subplots(1, 2), titles, strict=True):
        panel.axvline(1.0, color=PLAIN, linewidth=0.8)
        panel.axhline(0.0, color=PLAIN, linewidth=0.8)
        panel.set(xlim=(0, WIDEST), ylim=(-WIDEST - 0.1, WIDEST + 0.1), title=title)
        panel.set_xlabel("ratio c = π(token) / π when sampled")
        panel.locator_params(nbins=5)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], **style) for style in (WITHOUT_CLIP, WITH_CLIP)]
    figure.axes[0].legend(handles=handles, frameon=False, loc="upper left")


def draw_clip(figure: Figure, batch: Reuse, sign: str, low: float, high: float, updates: int) -> str:
    """Draw objective and gradient over the ratio for A = +1 or -1; ticks mark the tokens with that sign of A."""
    A = 1.0 if sign.startswith("+") else -1.0
    grid = torch.linspace(0.005, WIDEST, 500)
    gain, slope = surrogate_and_gradient(grid, torch.full_like(grid, A), low, high)
    ours = batch.advantages * A > 0
    tokens = batch.ratios[updates][ours]
    _, token_slopes = surrogate_and_gradient(tokens, torch.full_like(tokens, A), low, high)
    cut = token_slopes == 0
    edge = 1 + high if A > 0 else 1 - low
    for panel, values in zip(figure.axes, (gain, slope), strict=True):
        panel.fill_between((edge, WIDEST) if A > 0 else (0.0, edge), -0.9 * A, 3 * A, color=CUT, alpha=0.18, hatch="//",
                           linewidth=0)  # fmt: skip
        panel.plot(grid, grid * A, **WITHOUT_CLIP)
        panel.plot(grid, values, **WITH_CLIP)
        for these, height, colour in ((~cut, -0.6 * A, "black"), (cut, -0.3 * A, "#9E6C00")):
            x = tokens[these].clamp(max=WIDEST - 0.01)
            panel.plot(x, torch.full_like(x, height), "|", color=colour, markersize=9, alpha=0.45)
    return (
        f"A = {A:+.0f}, clipped at {1 - low:.2f} and {1 + high:.2f}: no gradient where c "
        f"{'>' if A > 0 else '<'} {edge:.2f} (hatched); the other edge cuts nothing here.\n"
        f"The rug: {len(tokens)} real tokens with this sign of A, after {updates} update{'s' * (updates != 1)} on one "
        f"rollout.\n{cut.float().mean():.1%} of them are cut (inner row); "
        f"their ratios go from {tokens.min():.3f} to {tokens.max():.2f}."
    )


def draw_reuse(figure: Figure, runs: dict[str, Reuse]) -> str:
    """Draw what the old completions predict (left) and the accuracy on held-out problems (right), over the updates."""
    believed, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.16, top=0.88, wspace=0.25)
    lines = []
    for (name, run), (line, marker, shift) in zip(runs.items(), (("-", "o", -0.12), ("--", "s", 0.12)), strict=True):
        believed.plot(run.believed, line, color="black", label=name)
        x = [done + shift for done in run.right]
        shares = [share for share, _, _ in run.right.values()]
        bars = [[s - lo for s, lo, _ in run.right.values()], [hi - s for s, _, hi in run.right.values()]]
        right.errorbar(x, shares, bars, fmt=line, marker=marker, color=COLOURS["reward"], capsize=3, label=name)
        lines.append(f"{name}: promised {run.believed[-1]:.2f}; right " + ", ".join(
            f"{share:.2f} after {done}" for done, (share, _, _) in run.right.items()))  # fmt: skip
    believed.set(title="predicted by the old completions", xlabel="updates on one rollout", ylabel="mean of c A")
    right.set(title="what new problems say", xlabel="updates on one rollout", ylabel="share right, 95 % interval")
    for panel in (believed, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    right.set_ylim(0, None)
    return "\n".join(lines)


def pull(lengths: tuple[int, int], how: str) -> list[Tensor]:
    """Return the gradient of the mean by each token's log-probability, for two completions with A = 1 at ratio 1."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logprobs = torch.zeros(mask.shape, requires_grad=True)
    gain = clipped_surrogate(logprobs, logprobs.detach(), torch.ones(2), mask)
    (slope,) = torch.autograd.grad(aggregate(gain, mask, how, constant=CONSTANT), logprobs)
    return [row[m] for row, m in zip(slope, mask, strict=True)]


SHORT_BAR = {"facecolor": "#56B4E9", "edgecolor": "black"}
LONG_BAR = {"facecolor": "white", "edgecolor": "black", "hatch": "//"}


def ground_of_length_bias(figure: Figure) -> None:
    """Draw what does not depend on the length in `draw_length_bias`."""
    share, token = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.17, right=0.96, bottom=0.2, top=0.84, wspace=0.15)
    share.set(xlabel="share of the gradient", xlim=(0, 1), yticks=range(3), yticklabels=MEANS)
    token.set(xlabel="pull of one token, |dJ / d log π|", xlim=(0, 0.14), yticks=range(3), yticklabels=[""] * 3)
    for panel in (share, token):
        panel.set_ylim(2.6, -0.6)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Patch(**SHORT_BAR, label=f"short: {SHORT} tokens"), Patch(**LONG_BAR, label="long:")]
    figure.legend(handles=handles, ncols=2, frameon=False, loc="upper center")


def draw_length_bias(figure: Figure, long: int) -> str:
    """Draw a short and a long completion under three means: shares of the gradient, and the gradient of a token."""
    (share, token), lines = figure.axes, []
    for y, how in enumerate(MEANS):
        short, other = pull((SHORT, long), how)
        part = (short.sum() / (short.sum() + other.sum())).item()
        share.barh(y, part, **SHORT_BAR)
        share.barh(y, 1 - part, left=part, **LONG_BAR)
        token.barh(y - 0.2, short[0].item(), 0.36, **SHORT_BAR)
        token.barh(y + 0.2, other[0].item(), 0.36, **LONG_BAR)
        lines.append(f"{how + ':':15}the short one has {part:.0%} of the gradient; "
                     f"its tokens pull {short[0] / other[0]:.1f} times as hard as the long one's")  # fmt: skip
    share.text(0.667, 0.933, f"{long} tokens", va="center", transform=figure.transFigure)  # beside the legend's "long:"
    return "\n".join(lines)


def push_to_stop(how: str, advantage: float, *, stop: float = 0.25, longest: int = 16) -> float:
    """Return the expected derivative of J by the logit of stopping, where every completion has the same advantage.

    No length is better then, so it should be 0. At each token the policy stops with probability `stop` or goes on,
    until `longest`; the expectation is a sum over all completions.
    """
    logit = torch.tensor(stop, dtype=torch.float64).logit().requires_grad_()
    go, end = torch.nn.functional.logsigmoid(-logit), torch.nn.functional.logsigmoid(logit)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(1, longest + 2):  # n tokens, the last of them the end; or longest tokens and no end
        row = torch.stack([go] * (n - 1) + [end])[:longest][None]
        mask = torch.ones_like(row, dtype=torch.bool)
        gain = clipped_surrogate(row, row.detach(), torch.tensor([advantage], dtype=torch.float64), mask)
        total = total + row.sum().detach().exp() * aggregate(gain, mask, how, constant=longest)
    return torch.autograd.grad(total, logit)[0].item()


def draw_why_zero(figure: Figure, run: RecordedRun) -> str:
    """Draw the loss of a recorded run beside the metrics to watch instead."""
    rows = run.metrics
    names = {"loss": ("loss", "black"), "reward": ("reward", COLOURS["reward"]), "grad_norm": ("grad_norm", PLAIN),
             "frac_reward_zero_std": ("share of groups\nthat teach nothing", COLOURS["zero_std"])}  # fmt: skip
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.2, top=0.74, wspace=0.3)
    figure.suptitle(run.label, fontsize=9)
    for panel, (name, (title, colour)) in zip(figure.subplots(1, 4), names.items(), strict=True):
        panel.plot([row["step"] for row in rows], [row[name] for row in rows], color=colour, linewidth=1.4)
        panel.set(title=title, xlabel="optimizer step")
        highest = max(row[name] for row in rows)  # the loss is so small that it needs a scale of its own
        panel.set_ylim(*((-0.05, 1.05 * max(1.0, highest)) if name != "loss" else (None, max(0.06, 1.1 * highest))))
        panel.title.set_fontsize(10)
        panel.spines[["top", "right"]].set_visible(False)
    first, last = ({name: round(row[name], 3) + 0.0 for name in names} for row in (rows[0], rows[-1]))  # not -0.000
    return "\n".join(f"{name}: {first[name]:.3f} at step 1, {last[name]:.3f} at step {len(rows)}" for name in names)
