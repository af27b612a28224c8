"""The judge of group advantages (notebook 04)."""

from collections.abc import Callable

from grpo_lab.algorithm.advantages import group_advantages as _adv
from grpo_lab.course.checks.judge import Case, Judge


def _group(formula: Callable) -> Callable:
    return lambda r: formula(r, r.mean(1, keepdim=True), r.std(1, keepdim=True))


group_advantages = Judge(
    contract="group_advantages(rewards[P, K]) -> [P, K]; the std divides by K - 1, std_eps = 1e-4 is added to it",
    reference=_adv,
    hint="Each row is a group of its own: subtract its mean, then divide by its own spread.",
    cases=(
        # std_eps comes later
        Case("the mean of a group becomes 0, its spread 1", [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]], atol=3e-4),
        Case("better than the group is positive, below zero too", [[-30.0, -10.0, -25.0]]),
        Case("each row is a group of its own", [[10.0, 0.0, 0.0, 10.0], [50.0, 90.0, 50.0, 50.0]]),
        Case("a group whose rewards are all equal gets 0", [[1.0, 1.0]]),
        # the plain formula leaves 6e-4 of rounding here, which does no harm
        Case("a group whose rewards are all equal gets 0", [[0.3] * 7, [0.7] * 7], atol=2e-3),
        Case("std_eps = 1e-4 is added to the std", [[0.001, 0.0]]),
    ),
    diagnoses={
        "you subtract the mean, but divide by nothing": _group(lambda r, m, s: r - m),
        "you divide by the spread, but do not subtract the mean": _group(lambda r, m, s: r / (s + 1e-4)),
        "you return the rewards as they came": lambda r: r.clone(),
        "your sign is flipped: better than the group is positive": _group(lambda r, m, s: (m - r) / (s + 1e-4)),
        "your std divides by K, not by K - 1": lambda r: (r - r.mean(1, True)) / (r.std(1, False, True) + 1e-4),
        "you divide by the variance, not by the std": _group(lambda r, m, s: (r - m) / (s**2 + 1e-4)),
        "your mean and std are those of all rewards, not of each group": lambda r: (r - r.mean()) / (r.std() + 1e-4),
        "your std is that of all rewards, not of each group": _group(lambda r, m, s: (r - m) / (r.std() + 1e-4)),
        "your mean is that of all rewards, not of each group": _group(lambda r, m, s: (r - r.mean()) / (s + 1e-4)),
        "you average over the prompts, not in each group": lambda r: (r - r.mean(0)) / (r.std(0) + 1e-4),
        "your mean or std has lost a dimension: use keepdim=True": lambda r: (r - r.mean(1)) / (r.std(1) + 1e-4),
        "a bracket is missing: subtract the mean before you divide": _group(lambda r, m, s: r - m / (s + 1e-4)),
        "a bracket is missing: add std_eps to the std, not to the quotient": _group(lambda r, m, s: (r - m) / s + 1e-4),
        "you compare with the others only, not with the whole group": lambda r: _adv(r, baseline="leave-one-out"),
        "you divide 0 by 0: nothing keeps the division finite": _group(lambda r, m, s: (r - m) / s),
        "your std_eps is inside the root": _group(lambda r, m, s: (r - m) / (s**2 + 1e-4).sqrt()),
        "your std_eps is so small that rounding becomes an advantage": _group(lambda r, m, s: (r - m) / (s + 1e-8)),
    },
)
