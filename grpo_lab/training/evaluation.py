"""Evaluation: pass@1 and pass@k with confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_lab.rewards.reward_models import Scored
from grpo_lab.rollout.prompts import Row
from grpo_lab.training.order import derived_seed
from grpo_lab.training.step import Components, decode, sample_completions, score_texts


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share among n prompts.

    Also for a mean of n values in [0, 1], such as pass@1 per prompt: their variance is never larger than
    that of yes-or-no answers with the same mean, so the interval is then wider than it need be.

    Source: Wilson, JASA 22 (1927).

    >>> [round(x, 3) for x in wilson_interval(0.5, 100)]
    [0.404, 0.596]
    """
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k completions is right, estimated without bias from n >= k of them.

        1 - C(n - correct, k) / C(n, k)

    Source: Chen et al., arXiv 2107.03374.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4)
    (0.25, 1.0)
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def evaluation_metrics(right: Sequence[tuple[bool, int]], rewards: Sequence[float], K: int) -> dict[str, float]:
    """Shares of right answers, each with its 95 % interval over prompts, and the mean reward.

    Args:
        right: for each prompt, whether the greedy answer is right, and how many of K sampled ones are.
        rewards: of the sampled answers; NaN where none was given.

    >>> evaluation_metrics([(True, 2), (False, 1)], [1.0, 1.0, 1.0, 0.0], 2)["eval/pass@1"]
    0.75
    """
    n = len(right)
    shares = {
        "pass@1_greedy": sum(g for g, _ in right) / n,
        "pass@1": sum(pass_at_k(K, c, 1) for _, c in right) / n,
        f"pass@{K}": sum(pass_at_k(K, c, K) for _, c in right) / n,
    }
    result = {}
    for name, share in shares.items():
        result[f"eval/{name}"] = share
        result[f"eval/{name}_low"], result[f"eval/{name}_high"] = wilson_interval(share, n)
    scored = [r for r in rewards if not math.isnan(r)]
    return result | {"eval/reward": math.fsum(scored) / len(scored) if scored else math.nan}


def evaluation_lines(scores: Mapping[str, float], K: int) -> list[str]:
    """What `GRPOTrainer.evaluate` found, in words: shares of right answers, each with its interval.

    >>> ends = {"": 0.5, "_low": 0.25, "_high": 0.75}
    >>> names = "pass@1", "pass@1_greedy", "pass@8"
    >>> evaluation_lines({f"eval/{name}{end}": share for name in names for end, share in ends.items()}, 8)[2]
    'right, at least one of 8: 50.0%   (95 %: 25.0% to 75.0%)'
    """
    return [
        f"right, {label}: {scores[f'eval/{key}']:.1%}   "
        f"(95 %: {scores[f'eval/{key}_low']:.1%} to {scores[f'eval/{key}_high']:.1%})"
        for label, key in (("sampled", "pass@1"), ("greedy", "pass@1_greedy"), (f"at least one of {K}", f"pass@{K}"))
    ]


def evaluate(c: Components, dataset, K: int) -> dict[str, float]:
    """Answer each prompt greedily once and K times sampled, each process its share; see `GRPOTrainer.evaluate`."""
    right: list[tuple[bool, int]] = []
    rewards: list[float] = []
    size = max(1, c.rollout_batch_size * c.config.num_generations_per_prompt // K)
    uniforms = uniforms_for(c, len(dataset) * K, "evaluate", 0)
    mine = c.processes.shard_range(len(dataset))
    for start in range(mine.start, mine.stop, size):
        rows = [dataset[i] for i in range(start, min(start + size, mine.stop))]
        greedy = answer(c, rows, uniforms[: len(rows)], 1, top_k=1)[1].first  # whatever the numbers are
        _, scored = answer(c, rows, uniforms[start * K : (start + len(rows)) * K], K)
        sampled = (scored.first.view(-1, K) >= c.config.success_reward).sum(1)
        right += zip((greedy >= c.config.success_reward).tolist(), sampled.tolist(), strict=True)
        rewards += scored.total.tolist()
    return evaluation_metrics(c.processes.gather(right), c.processes.gather(rewards), K)


def examples(c: Components, dataset, number: int) -> list[dict[str, Any]]:
    """Sample one completion for each of the first prompts, always with the same random numbers."""
    rows = [dataset[i] for i in range(min(number, len(dataset)))]
    texts, scored = answer(c, rows, uniforms_for(c, len(rows), "examples", 0), 1)
    return [
        {"prompt": row["prompt"], "completion": text, "reward": reward}
        for row, text, reward in zip(rows, texts, scored.total.tolist(), strict=True)
    ]


def answer(c: Components, rows: list[Row], uniforms: Tensor, K: int, **truncation) -> tuple[list[str], Scored]:
    """Sample K completions for each row and score them."""
    texts = decode(c, sample_completions(c, [row["prompt"] for row in rows], uniforms, K, **truncation))
    return texts, score_texts(c.rewards, rows, texts, K)


def uniforms_for(c: Components, rows: int, purpose: str, number: int) -> Tensor:
    """Draw [rows, max_new_tokens] uniform numbers from a seed of their own, on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(derived_seed(c.config.seed, purpose, number))
    return torch.rand(rows, c.config.max_new_tokens, generator=generator)
