"""The judges of the baseline and of the REINFORCE loss (notebook 01)."""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_lab.course.checks.inputs import log_of
from grpo_lab.course.checks.judge import Case, Judge


def _others(rewards: Tensor) -> Tensor:
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


baseline = Judge(
    contract="baseline(rewards[P, K]) -> [P, K]: for each completion the mean reward of the K - 1 others of its prompt",
    reference=_others,
    hint="Sum the row and subtract the completion's own reward. Over which axis do you sum, and do you keep that axis?",
    cases=(
        Case("with two completions, each one's baseline is the other's reward", [[1.0, 0.0], [0.0, 4.0]]),
        Case("a completion's own reward does not count", [[1.0, 0.0, 0.0, 1.0]]),
        Case("each row is a group of its own", [[1.0, 0.0, 0.0, 1.0], [5.0, 9.0, 5.0, 5.0]]),
        Case("if all rewards are equal, the baseline is that reward", [[3.0, 3.0, 3.0], [-1.0, -1.0, -1.0]]),
    ),
    diagnoses={
        "you return the advantages: here only the baseline is asked for": lambda r: r - _others(r),
        "your mean includes the completion's own reward": lambda r: r.mean(1, keepdim=True).expand_as(r),
        "your mean is that of all rewards, not of each group": lambda r: r.mean().expand_as(r),
        "you leave one out of all rewards, not of each group": lambda r: (r.sum() - r) / (r.numel() - 1),
        "you average over the prompts, not in each group": lambda r: r.mean(0).expand_as(r),
        "you leave one out of the prompts, not of the group": lambda r: (r.sum(0) - r) / (len(r) - 1),
        "your sum has lost a dimension: use keepdim=True": lambda r: (r.sum(1) - r) / (r.shape[1] - 1),
        "your mean has lost a dimension: use keepdim=True": lambda r: r.mean(1).expand_as(r),
        "you add up the others, but their mean is asked for": lambda r: r.sum(1, keepdim=True) - r,
        "you divide by K, but the others are K - 1": lambda r: (r.sum(1, keepdim=True) - r) / r.shape[1],
        "you divide only the sum by K - 1: subtract first": lambda r: r.sum(1, keepdim=True) / (r.shape[1] - 1) - r,
        "you return the rewards as they came": lambda r: r.clone(),
    },
)


def _reinforce(sign=-1.0, rank=lambda r: r - _others(r), of=lambda lp: lp, mean=torch.mean) -> Callable:
    return lambda lp, rewards: sign * mean(rank(rewards) * of(lp))


_DRAWN = log_of([0.5, 0.25], [0.25, 0.5])
reinforce_loss = Judge(
    contract="reinforce_loss(logprobs[P, K], rewards[P, K]) -> scalar to be minimised: minus the mean of advantage"
    " times log-probability, the advantage being the reward less the mean of the K - 1 others",
    reference=_reinforce(),
    gradient=True,
    hint="Its gradient by a log-probability is -A / (P K): a positive advantage must make the loss fall.",
    cases=(
        Case("the loss is minus the mean of A log pi", _DRAWN[:1], [[1.0, 0.0]]),
        Case("equal rewards give no loss and no gradient", _DRAWN[:1], [[1.0, 1.0]]),
        Case("adding the same number to all rewards changes nothing", _DRAWN[:1], [[11.0, 10.0]]),
        Case("each row is a group of its own", _DRAWN, [[1.0, 0.0], [0.0, 3.0]]),
        Case("the others are K - 1", log_of([0.5, 0.3, 0.1, 0.1]), [[1.0, 0.0, 0.0, 1.0]]),
    ),
    diagnoses={
        "your sign is flipped: the optimizer lowers the loss, and good words must become likelier": _reinforce(
            sign=1.0
        ),
        "you leave the baseline out": _reinforce(rank=lambda r: r),
        "you multiply by the baseline, not by the reward minus the baseline": _reinforce(rank=_others),
        "you use probabilities, not their logarithms": _reinforce(of=torch.exp),
        "you add up, but the mean is asked for": _reinforce(mean=torch.sum),
        "your baseline is the group's mean, which includes the completion itself": _reinforce(
            rank=lambda r: r - r.mean(1, keepdim=True)
        ),
        "your baseline is the mean of all rewards": _reinforce(rank=lambda r: r - r.mean()),
        "you subtract the baseline from the product: subtract it from the reward": lambda lp, r: (
            -(r * lp - _others(r)).mean()
        ),
        "your baseline is made of log-probabilities, so it adds a gradient of its own": lambda lp, r: (
            -(r * lp - _others(r * lp)).mean()
        ),
    },
)
