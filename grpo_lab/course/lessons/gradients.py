"""Notebook 01: a problem of four prompts and seven words, where every expectation can be computed exactly.

    J = mean over prompts of  sum over words of  pi(word | prompt) r(prompt, word)

The policy is a table of logits, one per prompt and word; gradients are taken with respect to these.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lab.algorithm.advantages import group_advantages

WORDS = ("red", "green", "blue", "white", "cold", "warm", "wet")
RIGHT = {
    "Snow is": ("white", "cold", "wet"), "Blood is": ("red", "warm", "wet"),
    "The sky is": ("blue", "white", "red"), "The sea is": ("wet", "blue", "green"),
}  # fmt: skip
PROMPTS = tuple(RIGHT)
BASELINES = ("none", "global mean", "group mean", "leave-one-out", "learned value")
SPREADS, SEEN, GROUP_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0), (0, 2, 10, 50), (2, 4, 8, 16, 32)


def world(spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a policy [P, V] of probabilities and rewards [P, V] of 0 or 1.

    Args:
        spread: how much the prompts differ in difficulty, in units of log-odds; at 0, each expects a reward of 1/2.
    """
    rewards = torch.tensor([[float(w in right) for w in WORDS] for right in RIGHT.values()], dtype=torch.float64)
    chance = torch.sigmoid(spread * torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=torch.float64))[:, None]
    uneven = torch.tensor(
        [3.0, 1.0, 2.0, 2.0, 3.0, 1.0, 2.0], dtype=torch.float64
    )  # some words come easier than others
    right, wrong = uneven * rewards, uneven * (1 - rewards)
    return chance * right / right.sum(1, True) + (1 - chance) * wrong / wrong.sum(1, True), rewards


def expected_reward(policy: Tensor, rewards: Tensor) -> Tensor:
    """sum over words of pi(word) r(word). [..., P, V] -> [..., P]"""
    return (policy * rewards).sum(-1)


def exact_gradient(policy: Tensor, rewards: Tensor) -> Tensor:
    """dJ / dlogit = pi (r - J_p) / P, summed over all seven words. [P, V]"""
    return policy * (rewards - expected_reward(policy, rewards)[..., None]) / policy.shape[-2]


def scores(policy: Tensor) -> Tensor:
    """Return the score of each word w: d log pi(w) / d logit_v = [v = w] - pi(v). [..., V] -> [..., w, v]"""
    return torch.eye(policy.shape[-1], dtype=policy.dtype) - policy[..., None, :]


def draw_words(policy: Tensor, uniforms: Tensor) -> Tensor:
    """Draw words [N, P, K] from policies [P, V] or [N, P, V] with the same number of uniform numbers."""
    return (uniforms[..., None] > policy.cumsum(-1)[..., None, :-1]).sum(-1)


def advantages(rewards: Tensor, baseline: str, values: Tensor | None = None) -> Tensor:
    """Return reward minus baseline, for one of five baselines. rewards [N, P, K], values [N, P] -> [N, P, K]"""
    if baseline == "none":
        return rewards
    if baseline == "global mean":
        return rewards - rewards.mean((1, 2), keepdim=True)
    if baseline == "learned value":
        return rewards - values[..., None]
    ours = {"group mean": "mean", "leave-one-out": "leave-one-out"}[baseline]
    return group_advantages(rewards.flatten(0, 1), baseline=ours, scale="none").view_as(rewards)


def estimates(policy: Tensor, words: Tensor, advantages: Tensor) -> Tensor:
    """Return the REINFORCE estimate: the mean over P prompts and K words of A d log pi. [N, P, K] -> [N, P, V]"""
    P, K = words.shape[1:]
    pull = torch.zeros(*words.shape[:2], policy.shape[-1], dtype=policy.dtype).scatter_add_(-1, words, advantages)
    return (pull - advantages.sum(-1, keepdim=True) * policy) / (P * K)


def variance_of_one_draw(policy: Tensor, rewards: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact mean [V] and variance [V] of (r - b) d log pi for one prompt, over the word that is drawn."""
    guesses = (rewards - baseline)[:, None] * scores(policy)
    mean = policy @ guesses
    return mean, policy @ guesses.square() - mean.square()


def best_baseline(policy: Tensor, rewards: Tensor) -> Tensor:
    """Return the baseline with the least variance of one draw: E[r |d log pi|^2] / E[|d log pi|^2]."""
    weight = policy * scores(policy).square().sum(-1)
    return weight @ rewards / weight.sum()


def expected_estimate(policy: Tensor, rewards: Tensor, baseline: str, K: int) -> Tensor:
    """Return the exact mean of the estimate for one prompt, policy [V] and rewards [V], over all 7^K groups. [V]"""
    groups = torch.cartesian_prod(*[torch.arange(len(policy))] * K)[:, None]
    guess = estimates(policy[None], groups, advantages(rewards[groups], baseline))[:, 0]
    return policy[groups[:, 0]].prod(-1) @ guess


class Noise(NamedTuple):
    """The noise of one estimator."""

    variance: float
    """Per completion: the variance of the batch's gradient, summed over the logits, times P * K."""
    error: float
    """Standard error of the variance."""
    length: float
    """Length of the mean gradient along the exact one; 1 is unbiased."""


def shrinkage(baseline: str, P: int, K: int) -> float:
    """Return the length of the expected estimate relative to the exact gradient; 1 is unbiased."""
    return {"group mean": 1 - 1 / K, "global mean": 1 - 1 / (P * K)}.get(baseline, 1.0)


def measure(policy: Tensor, rewards: Tensor, K: int, *, batches: int = 2000, seed: int = 0) -> dict[tuple, Noise]:
    """Measure the noise of each baseline on the same batches. Keys: (baseline, prompts seen by the value)."""
    generator = torch.Generator().manual_seed(seed)
    P, truth = len(policy), exact_gradient(policy, rewards)
    words = draw_words(policy, torch.rand(batches, P, K, generator=generator, dtype=torch.float64))
    got = rewards.expand(batches, -1, -1).gather(-1, words)
    result = {}
    for baseline in BASELINES:
        for seen in SEEN if baseline == "learned value" else (0,):
            values = learned_values(policy, rewards, K, seen, batches, generator)
            guess = estimates(policy, words, advantages(got, baseline, values))
            squares = (guess - guess.mean(0)).square().sum((1, 2)) * P * K
            length = (guess.mean(0) * truth).sum() / truth.square().sum()
            noise = Noise(squares.mean().item(), (squares.std() / batches**0.5).item(), length.item())
            result[baseline, seen] = noise
    return result


def learned_values(policy, rewards, K: int, seen: int, batches: int, generator, rate: float = 0.2) -> Tensor:
    """V <- V + rate (mean of K rewards - V), `seen` times from V = 0: SGD on the squared error. [batches, P]"""
    chance = expected_reward(policy, rewards).expand(batches, -1)
    values = torch.zeros_like(chance)
    for _ in range(seen):
        values += rate * (torch.binomial(torch.full_like(chance, K), chance, generator) / K - values)
    return values


class History(NamedTuple):
    """The curves of `runs` independent runs."""

    expected: Tensor
    """[steps + 1, runs, P] the exact expected reward, without the offset."""
    group_means: Tensor
    """[steps, runs, P] the mean of the K rewards drawn."""


def train(baseline: str, *, K: int = 8, steps: int = 60, rate: float = 3.0, value_rate: float = 0.2, runs: int = 100,
          spread: float = 1.0, offset: float = 0.0, seed: int = 0) -> History:  # fmt: skip
    """Follow the estimated gradient in many independent runs, with the same uniform numbers for every baseline."""
    generator = torch.Generator().manual_seed(seed)
    policy, rewards = world(spread)
    logits = policy.log().expand(runs, -1, -1)
    values = torch.zeros(runs, len(policy), dtype=torch.float64)
    expected, means = [expected_reward(policy, rewards).expand(runs, -1)], []
    for _ in range(steps):
        policy = logits.softmax(-1)
        words = draw_words(policy, torch.rand(runs, len(rewards), K, generator=generator, dtype=torch.float64))
        got = offset + rewards.expand(runs, -1, -1).gather(-1, words)
        logits = logits + rate * estimates(policy, words, advantages(got, baseline, values))
        values = values + value_rate * (got.mean(-1) - values)
        expected.append(expected_reward(logits.softmax(-1), rewards))
        means.append(got.mean(-1))
    return History(torch.stack(expected), torch.stack(means))


def follow(group_means: Tensor, rate: float) -> Tensor:
    """Return V [steps, ...] before each step: from V = 0, V <- V + rate (mean of the K rewards - V) after each."""
    values = [torch.zeros_like(group_means[0])]
    for mean in group_means[:-1]:
        values.append(values[-1] + rate * (mean - values[-1]))
    return torch.stack(values)
