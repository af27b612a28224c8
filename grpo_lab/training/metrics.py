"""Metrics of a run: their names and meanings, how a step computes them, and the JSON-lines files that hold them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo_lab.algorithm.advantages import all_equal, group_std
from grpo_lab.algorithm.losses import LossTerms
from grpo_lab.rollout.scoring import Scores
from grpo_lab.training.batches import MicroBatch

METRICS: dict[str, str] = {
    "step": "optimizer steps so far",
    "epoch": "times every prompt has been used, as a fraction",
    "loss": "value of the loss; hovers around 0 by construction, so watch the others",
    "reward": "mean reward of the completions",
    "reward_std": "spread of the reward within a group (n - 1), averaged over groups",
    "frac_reward_zero_std": "share of groups whose rewards are all equal: they teach nothing",
    "rewards/*/mean": "mean of one reward function, over the completions that it scored",
    "kl": "estimated KL to the reference per token, in nats",
    "entropy": "entropy of the next-token distribution, mean over sampled tokens, in nats",
    "grad_norm": "length of the gradient before clipping",
    "learning_rate": "learning rate of this step",
    "clip_ratio/low_mean": "share of tokens whose gradient is cut below 1 - eps (A < 0)",
    "clip_ratio/high_mean": "share of tokens whose gradient is cut above 1 + eps_high (A > 0)",
    "clip_ratio/region_mean": "the two together",
    "completions/mean_length": "tokens per completion, the end token included",
    "completions/min_length": "shortest completion, in tokens",
    "completions/max_length": "longest completion, in tokens",
    "completions/clipped_ratio": "share of completions cut off at max_new_tokens",
    "num_tokens": "tokens processed so far, prompts and completions",
    "sampling/sampling_logp_difference/mean": "mean |log p of the sampler - log p of the scorer|, in nats",
    "sampling/sampling_logp_difference/max": "the largest of these; rounding only, if both see one distribution",
    "sampling/importance_sampling_ratio/min": "smallest weight of a completion (or token) that vLLM sampled",
    "sampling/importance_sampling_ratio/mean": "mean of these weights: 1 if it samples as we score; capped above",
    "sampling/importance_sampling_ratio/max": "the largest of these",
    "skipped_steps": "updates not applied so far, because the gradient was not finite",
    "step_time": "seconds for this step",
    "eval/*_low": "lower end of its 95 % interval (Wilson)",
    "eval/*_high": "upper end of its 95 % interval (Wilson)",
    "eval/pass@1_greedy": "share of held-out prompts whose likeliest answer is right",
    "eval/pass@1": "share of sampled answers to held-out prompts that are right",
    "eval/pass@*": "share of held-out prompts with at least one right answer among so many sampled ones",
    "eval/reward": "mean reward of sampled answers to held-out prompts",
}
"""Every metric that a run logs. The names are TRL's, so that a learner can move on without relearning.

Four are defined more narrowly there: TRL 1.16 takes `reward_std` over the whole batch, counts completions instead of
tokens in `clip_ratio/*` where the ratio is per sequence, judges `frac_reward_zero_std` by the batch where rewards are
scaled by it, and averages over micro-batches. tests/test_trl.py shows each.
"""


class JsonLines:
    """A file with one JSON object per line, complete up to its last line whenever the program stops."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows and make sure that they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({k: _plain(v) for k, v in row.items()}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All rows; a line that is damaged or was cut off by a crash does not count."""
        if not self.path.exists():
            return []
        rows = []
        # split at "\n" only: a completion may hold other line ends, such as U+2028
        for line in self.path.read_bytes().split(b"\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut off, perhaps in the middle of a character
                continue
        return rows

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps: a run that resumes will write them again."""
        kept = JsonLines(self.path.with_suffix(".kept"))
        kept.path.unlink(missing_ok=True)
        kept.append([row for row in self.read() if row["step"] <= step])
        os.replace(kept.path, self.path)


def _plain(value: Any) -> Any:
    # JSON has no NaN
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One row for several steps: counters and evaluations as they are last, largest, smallest, else the mean.

    A value that is not a number (a reward function that scored nothing) does not count.
    """
    last = {"step", "epoch", "num_tokens", "skipped_steps", "learning_rate"}
    names = dict.fromkeys(name for row in rows for name in row)
    result = {}
    for name in names:
        values = [row[name] for row in rows if name in row and not math.isnan(row[name])] or [math.nan]
        if name in last or name.startswith("eval/"):
            result[name] = values[-1]
        elif name.endswith(("/max", "/max_length")):
            result[name] = max(values)
        elif name.endswith(("/min", "/min_length")):
            result[name] = min(values)
        else:
            result[name] = math.fsum(values) / len(values)
    return result


@dataclass
class UpdateSums:
    """Sums over the micro-batches of one update, from which its metrics are made."""

    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    difference: float = 0.0
    largest_difference: float = 0.0
    largest_kl: float = 0.0
    weights: list[float] = field(default_factory=list)
    """Importance weight of each completion or token; empty if the policy itself has sampled."""

    @classmethod
    def merged(cls, several: list["UpdateSums"]) -> "UpdateSums":
        """Return the sums over all processes."""

        def of(name: str):
            values = [getattr(sums, name) for sums in several]
            if name == "weights":
                return [weight for some in values for weight in some]
            return max(values) if name.startswith("largest") else math.fsum(values)

        return cls(**{f.name: of(f.name) for f in fields(cls)})

    def add(self, terms: LossTerms, scores: Scores, part: MicroBatch, weights: Tensor | None = None) -> None:
        """Add one micro-batch."""
        mask = part.rollouts.completion_mask
        difference = (scores.logprobs.detach() - part.rollouts.logprobs).where(mask, 0.0).abs()
        self.loss += terms.loss.item()
        self.entropy += scores.entropies.where(mask, 0.0).sum().item()
        self.clipped_low += terms.clipped_low.sum().item()
        self.clipped_high += terms.clipped_high.sum().item()
        self.difference += difference.sum().item()
        self.largest_difference = max(self.largest_difference, difference.max().item())
        if terms.kl is not None:
            self.kl += terms.kl.sum().item()
            self.largest_kl = max(self.largest_kl, terms.kl.abs().max().item())
        if weights is not None:
            self.weights += (weights[mask] if weights.shape == mask.shape else weights.flatten()).tolist()


def batch_metrics(lengths: Tensor, ended: Tensor, rewards: Tensor, by_function: dict[str, Tensor]) -> dict[str, float]:
    """Return the metrics of a rollout.

    Args:
        lengths: [B] tokens of each completion.
        ended: [B] whether it ended with an end token.
        rewards: [P, K].
        by_function: name -> [B] rewards of one function.
    """
    metrics = {
        "reward": rewards.nanmean().item(),
        "reward_std": group_std(rewards).mean().item(),
        "frac_reward_zero_std": all_equal(rewards).float().mean().item(),
        "completions/mean_length": lengths.float().mean().item(),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": (~ended).float().mean().item(),
    }
    return metrics | {f"rewards/{name}/mean": values.nanmean().item() for name, values in by_function.items()}


def update_metrics(
    sums: UpdateSums, tokens: int, *, grad_norm: float, learning_rate: float, first: bool, with_kl: bool
) -> dict[str, float]:
    """Return the metrics of an update.

    Args:
        tokens: sampled tokens of the batch, over which `sums` run.
        first: whether it is the first update on its rollout, which compares sampler and scorer.
        with_kl: whether there is a reference.
    """
    metrics = {
        "loss": sums.loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "entropy": sums.entropy / tokens,
        "clip_ratio/low_mean": sums.clipped_low / tokens,
        "clip_ratio/high_mean": sums.clipped_high / tokens,
        "clip_ratio/region_mean": (sums.clipped_low + sums.clipped_high) / tokens,
    }
    if with_kl:
        metrics["kl"] = sums.kl / tokens
    if first:
        metrics["sampling/sampling_logp_difference/mean"] = sums.difference / tokens
        metrics["sampling/sampling_logp_difference/max"] = sums.largest_difference
    if first and sums.weights:
        metrics["sampling/importance_sampling_ratio/min"] = min(sums.weights)
        metrics["sampling/importance_sampling_ratio/mean"] = math.fsum(sums.weights) / len(sums.weights)
        metrics["sampling/importance_sampling_ratio/max"] = max(sums.weights)
    return metrics
