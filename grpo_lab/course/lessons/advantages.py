"""Notebook 04: groups drawn from a coin, what the std does to easy and hard prompts, and groups of a real run."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo_lab.algorithm.advantages import group_advantages
from grpo_lab.course.recorded import RecordedRun
from grpo_lab.training.batches import StepRecord
from grpo_lab.training.figures import running_mean

# The same uniform numbers for every K and p: a group that grows keeps the completions it has
_UNIFORMS = torch.rand(2000, 64, generator=torch.Generator().manual_seed(0))


def coin_rewards(K: int, p: float) -> Tensor:
    """Return rewards [2000, K] of 0 and 1: each completion is right with probability p, independently."""
    return (_UNIFORMS[:, :K] < p).float()


def dead_share(p: float | Tensor, K: int) -> float | Tensor:
    """Return the probability that all K answers are right, or all are wrong: p^K + (1 - p)^K.

    >>> dead_share(0.5, 2)
    0.5
    """
    return p**K + (1 - p) ** K


def expected_push(p: Tensor, K: int, *, baseline: str = "mean", scale: str = "group") -> Tensor:
    """Return the expected push on the policy of a prompt whose answers are right with probability p.

    For a policy with one weight, p = sigmoid(weight), whose score is r - p: the mean over the group of
    A_k * (r_k - p), its expectation enumerated over the number of right answers. The true gradient is p (1 - p).

    Args:
        p: [N] in float64.
    Returns: [N].
    """
    rewards = torch.ones(K + 1, K, dtype=p.dtype).tril(-1)  # row c has c right answers
    advantages = group_advantages(rewards, baseline=baseline, scale=scale)
    ways = torch.tensor([math.comb(K, c) for c in range(K + 1)], dtype=p.dtype)
    right = torch.arange(K + 1)
    chance = ways * p[:, None] ** right * (1 - p[:, None]) ** (K - right)  # [N, K + 1]
    push = (advantages * rewards).mean(-1) - p[:, None] * advantages.mean(-1)
    return (chance * push).sum(-1)


def plain_advantages(rewards: Tensor, std_eps: float) -> Tensor:
    """Return the advantages by the plain formula, without the rule for dead groups. [P, K] -> [P, K]."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + std_eps)


def group_rewards(record: StepRecord) -> Tensor:
    """Return the rewards of a step's completions as [P, K]; the completions of a prompt are consecutive."""
    rewards = torch.tensor([row["reward"] for row in record.completions])
    return rewards.view(len({row["prompt"] for row in record.completions}), -1)


def shares_by_right_answers(rewards: Tensor) -> list[float]:
    """Return the share of the groups [P, K] that have 0, 1, ..., K right answers."""
    return (torch.bincount(rewards.sum(1).long(), minlength=rewards.shape[1] + 1) / len(rewards)).tolist()


def recorded_by_k(runs: Mapping[int, Sequence[RecordedRun]], name: str, reach: int = 3) -> dict[int, list[float]]:
    """Return a metric of recorded runs at each step: for each K the smoothed mean over its seeds."""
    curves = {}
    for K, seeds in runs.items():
        values = [[row[name] for row in run.metrics] for run in seeds]
        curves[K] = running_mean([math.fsum(v) / len(v) for v in zip(*values, strict=True)], reach)
    return curves


def final_reward(run: RecordedRun) -> float:
    """Return the mean reward of the last ten steps."""
    return math.fsum(row["reward"] for row in run.metrics[-10:]) / 10
