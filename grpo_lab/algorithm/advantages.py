"""Advantages: how much better each completion was than its group. They replace PPO's value network."""

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["mean", "leave-one-out", "none"]
Scale = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor, *, baseline: Baseline = "mean", scale: Scale = "group", std_eps: float = 1e-4
) -> Tensor:
    """Return the advantage of each completion over its group.

        A[p, k] = (r[p, k] - mean(r[p])) / (std(r[p]) + std_eps)        std divides by K - 1

    If all rewards of a group are equal, its advantages are exactly zero. A reward of NaN means "not
    scored": that completion gets zero and does not count in mean, std or K.

    Args:
        rewards: [P, K] one reward per completion.
        baseline: what is subtracted. "mean" of the group; "leave-one-out", the mean of the K - 1 others
            (RLOO), which does not depend on the completion itself and so keeps the gradient unbiased;
            "none" (plain REINFORCE, where equal rewards do give a gradient).
        scale: what divides. The std of the "group" (GRPO) or of the whole "batch"; "none" (Dr. GRPO: dividing
            by the group's std gives very easy and very hard prompts more weight).
        std_eps: keeps the division finite; in the units of the reward, added outside the root.
    Returns: [P, K], without gradient.
    Raises: ValueError if rewards is not [P, K] with K >= 2, or for an unknown option.
    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2; RLOO (arXiv 2402.14740); Dr. GRPO
        (arXiv 2503.20783).

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.]]), scale="none")
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    >>> group_advantages(torch.tensor([[1., 0., 0., 1.]]))  # std = sqrt(4 * 0.25 / 3) = 0.5774
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659]])
    """
    _check_groups(rewards)
    rewards = rewards.detach() if rewards.dtype == torch.float64 else rewards.detach().float()
    scored = ~rewards.isnan()
    r = rewards.where(scored, 0.0)
    n = scored.sum(1, keepdim=True)
    mean = r.sum(1, keepdim=True) / n

    if baseline == "mean":
        advantages = r - mean
    elif baseline == "leave-one-out":
        advantages = (r - mean) * n / (n - 1)  # = r - mean of the others
    elif baseline == "none":
        advantages = r
    else:
        raise ValueError(f'baseline must be "mean", "leave-one-out" or "none", got {baseline!r}')

    if scale == "group":
        advantages = advantages / (group_std(rewards)[:, None] + std_eps)
    elif scale == "batch":
        everything = rewards[scored]
        advantages = advantages / (everything.std() + std_eps) if len(everything) > 1 else advantages
    elif scale != "none":
        raise ValueError(f'scale must be "group", "batch" or "none", got {scale!r}')

    live = scored
    if baseline != "none":
        # equal rewards leave a rounding error of 1e-8 that a std near 0 would enlarge; fewer than two scores leave NaN
        live = scored & ~all_equal(rewards)[:, None]
    return advantages.where(live, 0.0)


def all_equal(rewards: Tensor) -> Tensor:
    """Return True for each group whose scored rewards are all equal. [P, K] -> [P] bool."""
    low = rewards.nan_to_num(nan=torch.inf).amin(1)
    high = rewards.nan_to_num(nan=-torch.inf).amax(1)
    return low >= high


def group_std(rewards: Tensor) -> Tensor:
    """Return the standard deviation of each group's scored rewards, dividing by n - 1. [P, K] -> [P], 0 where n < 2."""
    scored = ~rewards.isnan()
    n = scored.sum(1)
    mean = rewards.nansum(1) / n
    squares = (rewards - mean[:, None]).square().where(scored, 0.0).sum(1)
    return (squares / (n - 1).clamp(min=1)).sqrt()


def discounted(advantages: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Return an advantage for each token, discounted by its distance from the end.

        A[i, t] = gamma^(n_i - 1 - t) A[i]        n_i tokens in completion i; the last one gets A[i]

    Args:
        advantages: [B].
        mask: [B, T] True where a token was sampled, the end token included; completions start at 0.
        gamma: discount factor in (0, 1]; with 1.0 (GRPO) every token gets the whole advantage.
    Returns: [B, T], zero where the mask is False.

    >>> discounted(torch.tensor([8.0]), torch.tensor([[True, True, True, False]]), gamma=0.5)
    tensor([[2., 4., 8., 0.]])
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    remaining = (mask.sum(1, keepdim=True) - 1 - positions).clamp(min=0)
    return (advantages[:, None] * gamma**remaining).where(mask, 0.0)


def _check_groups(rewards: Tensor) -> None:
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards must be [prompts, K], got {list(rewards.shape)}. "
            "One flat list of P*K rewards? Use rewards.view(P, K)."
        )
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be [prompts, K] with K >= 2, got K = {rewards.shape[1]}. "
            "One completion has nothing to be compared with: its advantage would always be 0."
        )
