"""What one rollout gives, and what is counted while it is used."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_lab.advantages import all_equal, group_std
from grpo_lab.losses import LossTerms
from grpo_lab.sampling import Rollouts
from grpo_lab.scoring import Scores


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did."""

    step: int
    """Counts from 1."""
    metrics: dict[str, float]
    """See grpo_lab.reporting.METRICS."""
    completions: list[dict[str, Any]]
    """One per completion: prompt, completion, reward, rewards of each function, advantage, and its tokens with their
    log-probabilities (`token_rows`)."""


@dataclass
class MicroBatch:
    """Some groups of a batch, as tensors."""

    rollouts: Rollouts
    ref_logprobs: Tensor | None
    """[B, T] in nats under the reference; None where no KL is wanted."""
    old_logprobs: Tensor | None = None
    """[B, T] in nats as of the first update on this batch; None until then."""
    advantages: Tensor | None = None
    """[B], or [B, T] where gamma < 1."""

    def token_rows(self) -> list[dict[str, list]]:
        """For each completion its tokens and their log-probabilities in nats, to four decimals, to be logged."""
        columns = {"completion_ids": self.rollouts.completion_ids, "logprobs": self.rollouts.logprobs}
        if self.ref_logprobs is not None:
            columns["ref_logprobs"] = self.ref_logprobs
        mask = self.rollouts.completion_mask.cpu()
        columns = {name: values.cpu() for name, values in columns.items()}
        return [
            {name: [round(x, 4) for x in values[i][mask[i]].tolist()] for name, values in columns.items()}
            for i in range(len(mask))
        ]


@dataclass
class Batch:
    """All that one rollout gave; used for num_iterations optimizer steps."""

    parts: list[MicroBatch]
    completions: list[dict[str, Any]]
    metrics: dict[str, float]
    updates: int = 0
    """Optimizer steps made on it so far."""

    @classmethod
    def from_dict(cls, saved: dict[str, Any], device) -> "Batch":
        """Undo `dataclasses.asdict`."""

        def part(values: dict[str, Any]) -> MicroBatch:
            tensors = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
            return MicroBatch(**{**values, **tensors, "rollouts": Rollouts(**values["rollouts"]).to(device)})

        return cls(**{**saved, "parts": [part(p) for p in saved["parts"]]})


@dataclass
class UpdateSums:
    """Running sums over the micro-batches of one update."""

    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    difference: float = 0.0
    largest_difference: float = 0.0
    largest_kl: float = 0.0

    def add(self, terms: LossTerms, scores: Scores, part: MicroBatch) -> None:
        """Count one micro-batch in."""
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


def batch_metrics(parts: list[MicroBatch], rewards: Tensor, by_function: dict[str, Tensor]) -> dict[str, float]:
    """What a rollout says of itself: rewards [P, K], of each function [B], lengths in tokens."""
    lengths = torch.cat([part.rollouts.completion_mask.sum(1) for part in parts]).float()
    ended = torch.cat([part.rollouts.ended for part in parts])
    metrics = {
        "reward": rewards.nanmean().item(),
        "reward_std": group_std(rewards).mean().item(),
        "frac_reward_zero_std": all_equal(rewards).float().mean().item(),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": (~ended).float().mean().item(),
    }
    return metrics | {f"rewards/{name}/mean": values.nanmean().item() for name, values in by_function.items()}
