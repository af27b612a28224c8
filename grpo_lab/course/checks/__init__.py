"""Judges of a learner's functions: is it right, or which mistake is in it?

A judge calls a function with small inputs, from the simplest to the trickiest, and compares value, shape, dtype
and gradient with the reference. If a case fails, it calls known wrong versions with the same inputs: the one that
returns what the learner's function returned is the likely mistake. A judge never raises, uses no random numbers, and
returns a Verdict. A setting such as `temperature` is tested only if the function takes it. There is no timeout.

>>> group_advantages
group_advantages(rewards[P, K]) -> [P, K]; the std divides by K - 1, std_eps = 1e-4 is added to it
>>> group_advantages(lambda rewards: rewards - rewards.mean(1, keepdim=True))
[not yet] group_advantages: you subtract the mean, but divide by nothing.
    rewards   [[1, 0, 0, 1], [1, 0, 0, 0]]
    expected  [[0.8659, -0.8659, -0.8659, 0.8659], [1.5, -0.4999, -0.4999, -0.4999]]
    got       [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]]
    hint      Each row is a group of its own: subtract its mean, then divide by its own spread.
"""

from grpo_lab.course.checks.advantages import group_advantages
from grpo_lab.course.checks.judge import COLOURS, Case, Judge, Verdict
from grpo_lab.course.checks.kl import kl_estimate
from grpo_lab.course.checks.logprobs import token_logprobs
from grpo_lab.course.checks.losses import aggregate, clipped_surrogate, grpo_loss
from grpo_lab.course.checks.policy_gradient import baseline, reinforce_loss
from grpo_lab.course.checks.rewards import reward
from grpo_lab.course.checks.sampling import completion_mask, truncate
from grpo_lab.course.checks.step import training_step

__all__ = [
    "COLOURS",
    "Case",
    "Judge",
    "Verdict",
    "aggregate",
    "baseline",
    "clipped_surrogate",
    "completion_mask",
    "group_advantages",
    "grpo_loss",
    "kl_estimate",
    "reinforce_loss",
    "reward",
    "token_logprobs",
    "training_step",
    "truncate",
]
