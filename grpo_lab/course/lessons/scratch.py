"""Notebooks 07 and 08: GRPO by hand, a few updates on one group, and a table of metrics.

`logits_for`, `roll_out` and `grpo_by_hand` are cells of notebook 07, word for word (a test compares them), so that
notebook 08 can compare the trainer with the same loop.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn

import grpo_lab
from grpo_lab import StepRecord, completion_logprobs, group_advantages, kl_estimate, sample, token_logprobs
from grpo_lab.models.forward import completion_logits
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.rollout.sampling import Rollouts, left_pad
from grpo_lab.rollout.scoring import completion_scores
from grpo_lab.training.figures import COLOURS
from grpo_lab.training.metrics import METRICS
from grpo_lab.training.order import PromptOrder, derived_seed

PROMPT, SEED = "5,9,2:47=", 344
"""Four completions of this prompt, drawn with this seed, earn 1, 0, 0, 1, and all differ."""
REWARDS = {"1, 0, 0, 1": [1.0, 0.0, 0.0, 1.0], "1, 1, 1, 1": [1.0] * 4, "1, 0, 0, 0": [1.0, 0.0, 0.0, 0.0]}
LABELS = {"reward": "mean reward", "kl": "KL, nats per token", "entropy": "entropy, nats"}
RIGHT, WRONG = COLOURS["reward"], "#D55E00"
STYLES = ("-", "--", "-.", ":")


def grpo_loss(*tensors: Tensor, **settings) -> Tensor:
    """Return the loss of `grpo_lab.grpo_loss` as a tensor."""
    return grpo_lab.grpo_loss(*tensors, **settings).loss


def training_step(model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0):
    """One update of the policy; `model(tokens)` gives the logits that predict the tokens."""
    loss = grpo_loss(
        token_logprobs(model(tokens), tokens), old_logprobs, group_advantages(rewards).flatten(), mask,
        ref_logprobs=ref_logprobs, kl_coef=kl_coef,
    )  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def logits_for(model, rollouts):
    """The policy as `training_step` calls it: tokens [B, T] -> their logits [B, T, V]."""
    ids, attention = rollouts.input_ids, rollouts.attention_mask
    return lambda tokens: completion_logits(model, ids, attention, tokens.shape[1])


def roll_out(model, tokenizer, prompts, K, uniforms):
    """K completions of each prompt, as tensors, as rewards [P, K], and as rows to be looked at."""
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    ids, attention = left_pad(tokens, tokenizer.pad_token_id)
    ends = {"end_ids": [tokenizer.eos_token_id], "pad_id": tokenizer.pad_token_id}
    rollouts = sample(model, ids, attention, num_generations=K, uniforms=uniforms, **ends)
    texts = tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
    repeated = [prompt for prompt in prompts for _ in range(K)]
    rewards = torch.tensor(countdown(repeated, texts)).view(len(prompts), K)
    advantages = group_advantages(rewards)
    columns = repeated, texts, rewards.flatten().tolist(), advantages.flatten().tolist()
    names = "prompt", "completion", "reward", "advantage"
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rollouts, rewards, rows


def grpo_by_hand(
    model, tokenizer, dataset, *, steps, P=16, K=8, T=16, learning_rate=6e-4, kl_coef=0.02, seed=0
):  # fmt: skip
    """GRPO, all of it: trains the model in place, and tells after each step how it went."""
    reference = copy.deepcopy(model)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=True)
    order = PromptOrder(len(dataset), P, seed)
    for step in range(steps):
        prompts = [dataset[i]["prompt"] for i in next(order)]
        dice = torch.Generator().manual_seed(derived_seed(seed, "rollout", step))
        uniforms = torch.rand(len(prompts) * K, T, generator=dice)
        rollouts, rewards, rows = roll_out(model, tokenizer, prompts, K, uniforms)

        tokens, mask = rollouts.completion_ids, rollouts.completion_mask
        where = rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens
        with torch.no_grad():
            old, entropies = completion_scores(model, *where)
            ref = completion_logprobs(reference, *where)
        policy = logits_for(model, rollouts)
        training_step(policy, optimizer, tokens, mask, rewards, old, ref, kl_coef)

        gradients = [p.grad for p in weights if p.grad is not None]
        metrics = {
            "step": step + 1,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(1).mean().item(),
            "frac_reward_zero_std": (rewards.std(1) == 0).float().mean().item(),
            "kl": kl_estimate(old, ref, mask)[mask].mean().item(),
            "entropy": entropies[mask].mean().item(),
            "grad_norm": torch.nn.utils.get_total_norm(gradients).item(),
            "completions/mean_length": mask.sum(1).float().mean().item(),
        }
        yield StepRecord(step + 1, metrics, rows)


@dataclass(frozen=True)
class Group:
    """Four completions of one prompt, and the probability of each after 0, 1, 2, … updates on them."""

    texts: list[str]
    rollouts: Rollouts
    probabilities: dict[str, Tensor]
    """Name of the rewards -> [updates + 1, 4], the probability of the whole completion."""


def compute_group(step: Callable, model: nn.Module, tokenizer, *, updates: int = 10) -> Group:
    """Sample four completions, then make several updates on the same four, from the start for each row of REWARDS.

    Args:
        step: a `training_step`, the learner's for example.
        model: is copied, not changed.
    """
    uniforms = torch.rand(4, 16, generator=torch.Generator().manual_seed(SEED))
    rollouts, _, rows = roll_out(model, tokenizer, [PROMPT], 4, uniforms)
    tokens, mask = rollouts.completion_ids, rollouts.completion_mask
    probabilities = {}
    for name, rewards in REWARDS.items():
        policy = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-5, weight_decay=0.0)
        ask, seen, old = logits_for(policy, rollouts), [], None
        for _ in range(updates + 1):
            with torch.no_grad():
                logprobs = token_logprobs(ask(tokens), tokens).where(mask, 0.0)
            seen.append(logprobs.sum(1).exp())
            old = logprobs if old is None else old
            step(ask, optimizer, tokens, mask, torch.tensor([rewards]), old)
        probabilities[name] = torch.stack(seen)
    return Group([row["completion"] for row in rows], rollouts, probabilities)


def ground_of_group(figure: Figure, group: Group) -> None:
    """Draw what does not depend on any control in `draw_group`: axes, names, first probabilities."""
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.19, top=0.88, wspace=0.26)
    bars, ways = figure.subplots(1, 2)
    history = group.probabilities["1, 0, 0, 1"]
    before = bars.bar([x - 0.2 for x in range(4)], history[0].tolist(), 0.38, facecolor="none", edgecolor="#555555",
                      label="when sampled")  # fmt: skip
    bars.set_xticks(range(4), [f"{text}\n" for text in group.texts])
    bars.set(xlim=(-0.6, 3.6), ylabel="probability of the completion", title=f"Completions of {PROMPT}")
    handles = [before, Patch(color=RIGHT, label="now, reward 1"), Patch(color=WRONG, label="now, reward 0")]
    bars.legend(handles=handles, frameon=False, loc="upper left")
    lines = [Line2D([], [], color="#555555", linestyle=s, label=t) for s, t in zip(STYLES, group.texts, strict=True)]
    ways.legend(handles=lines, frameon=False, loc="upper left", ncols=2)
    ways.set(xlabel="updates on the same four completions", ylabel="probability", title="During the updates")
    ways.set_xlim(-0.05 * len(history), 1.05 * len(history) - 1)
    for panel in (bars, ways):
        panel.set(ylim=(0, 0.75), yticks=[0, 0.2, 0.4, 0.6])
        panel.spines[["top", "right"]].set_visible(False)


def draw_group(figure: Figure, group: Group, rewards: str, updates: int) -> str:
    """Draw the probability of each of the four completions, before and now, and the curve between."""
    bars, ways = figure.axes
    history, earned = group.probabilities[rewards], REWARDS[rewards]
    before, now = history[0].tolist(), history[updates].tolist()
    colours = [RIGHT if reward else WRONG for reward in earned]
    bars.bar([x + 0.2 for x in range(4)], now, 0.38, color=colours)
    for x, (values, reward, colour, style) in enumerate(zip(history.T.tolist(), earned, colours, STYLES, strict=True)):
        bars.text(x, -0.095, f"reward {reward:.0f}", ha="center", va="top")
        ways.plot(range(len(values)), values, style, color=colour, linewidth=1.8)
        ways.plot(updates, values[updates], "o", color=colour)
    pairs = zip(group.texts, before, now, strict=True)
    moves = ", ".join(f"{text} {a:.3f} to {b:.3f}" for text, a, b in pairs)
    return f"rewards {rewards}, probability from update 0 to {updates}:\n{moves}"


def largest_difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the largest difference of one metric between two runs, over all steps."""
    return max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True))


def draw_two_runs(figure: Figure, runs: Mapping[str, Sequence[Mapping[str, Any]]], names=tuple(LABELS)) -> str:
    """Draw the metrics of two runs, the first as a line, the second as circles; state how far they differ."""
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.17, top=0.95, wspace=0.32)
    (first, line), (second, circles) = runs.items()
    lines = []
    for panel, name in zip(figure.subplots(1, len(names)), names, strict=True):
        steps = [row["step"] for row in line]
        panel.plot(steps, [row[name] for row in line], color=COLOURS[name], linewidth=1.8, label=first)
        panel.plot(steps, [row[name] for row in circles], "o", mfc="none", mec="#333333", markersize=5, label=second)
        panel.set(xlabel="optimizer step", ylabel=LABELS[name], ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
        lines.append(f"{name}: {line[0][name]:.2f} at step 1, {line[-1][name]:.2f} at step {steps[-1]}; "
                     f"the two runs differ by at most {largest_difference(line, circles, name):.3f}")  # fmt: skip
    figure.axes[0].legend(frameon=False, loc="lower right")
    return "\n".join(lines)


def metrics_table(history: Sequence[Mapping[str, float]]) -> str:
    """Return every metric of a run with its meaning, from `grpo_lab.training.metrics.METRICS`, as a Markdown table.

    Raises: KeyError for a metric without an explanation.
    """
    first, last = history[0], history[-1]
    lines = [f"| metric | what it is | step {first['step']} | step {last['step']} |", "|:--|:--|--:|--:|"]
    for name in last:
        meaning = METRICS["rewards/*/mean" if name.startswith("rewards/") else name].replace("|", "\\|")
        values = ["" if name == "step_time" else _short(row[name], name) for row in (first, last)]
        lines.append(f"| `{name}` | {meaning} | {values[0]} | {values[1]} |")
    return "\n".join(lines)


def _short(value: float, name: str) -> str:
    exact = name == "learning_rate" or value == int(value)
    return f"{value:g}" if exact else f"{round(value, 2) + 0.0:.2f}"  # + 0.0 makes 0 of -0
