"""Comparing runs honestly: paired intervals over seeds, what a few seeds can see, and what best-of-K costs."""

import tempfile
from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

import torch
from torch import Tensor

from grpo_lab import GRPOConfig, GRPOTrainer, StepRecord
from grpo_lab.course.checks import Case, Judge
from grpo_lab.course.recorded import RecordedRun, recorded_runs
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.rollout.sampling import end_token_ids, left_pad, pad_token_id, sample
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.training.evaluation import pass_at_k
from grpo_lab.training.figures import running_mean

# the 97.5 % quantile of Student's t, for n = 2, 3, ... numbers (n - 1 degrees of freedom)
T95 = dict(enumerate((
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
), 2))  # fmt: skip

SWEEPS: dict[str, dict[str, str]] = {
    "K": {"2": "K-2", "4": "K-4", "8": "pocket", "16": "K-16", "32": "K-32"},
    "β": {"0": "beta-0", "0.02": "pocket", "0.1": "beta-0.1", "0.5": "beta-0.5", "2": "beta-2"},
    "variant": {name: f"preset-{name}" for name in
                ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo", "reinforce")},
}  # fmt: skip
"""Label -> the recorded runs that it stands for."""
BASE = {"K": "8", "β": "0.02", "variant": "grpo"}
SEEDS = 3
MEASURES = ("right on held-out problems", "mean reward of the run", "dead groups at the end", "entropy at the end")


def sweep(name: str) -> dict[str, list[RecordedRun]]:
    """Return the recorded runs of a sweep, each with seeds 0, 1, 2."""
    return {label: recorded_runs(folder)[:SEEDS] for label, folder in SWEEPS[name].items()}


def measure(run: RecordedRun, what: str) -> float:
    """Return one of MEASURES for a run; "at the end" is the mean of the last 20 steps."""
    if what == "right on held-out problems":
        return run.info["after"]["eval/pass@1"]
    column = {"mean reward of the run": "reward", "dead groups at the end": "frac_reward_zero_std"}.get(what, "entropy")
    values = [row[column] for row in run.metrics]
    return mean(values if what == "mean reward of the run" else values[-20:])


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference, seed by seed, and its confidence interval.

        d[i] = ours[i] - theirs[i],    mean(d) ± t · std(d) / sqrt(n)        std divides by n - 1

    Returns: mean, and both ends of the 95 % interval.

    >>> [round(x, 3) for x in paired_interval([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])]  # d = 1, 2, 3
    [2.0, -0.484, 4.484]
    """
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = T95[len(d)] * stdev(d) / sqrt(len(d))
    return mean(d), mean(d) - half, mean(d) + half


def verdict(low: float, high: float) -> str:
    """Say in words what an interval allows us to conclude."""
    return "higher" if low > 0 else "lower" if high < 0 else "inconclusive"


def compare(name: str, what: str) -> dict[str, tuple[float, float, float]]:
    """Compare each setting of a sweep with its base: the paired difference and its interval."""
    numbers = {label: [measure(run, what) for run in runs] for label, runs in sweep(name).items()}
    base = numbers[BASE[name]]
    return {label: paired_interval(values, base) for label, values in numbers.items() if label != BASE[name]}


def standard_experiments(number: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of n standard normal differences, for each n in T95, in each experiment.

    Returns: two tensors [n in T95, number], always the same ones.
    """
    draws = torch.randn(max(T95), number, generator=torch.Generator().manual_seed(0))
    some = [draws[:n] for n in T95]
    return torch.stack([d.mean(0) for d in some]), torch.stack([d.std(0) for d in some])


def power(difference: float, spread: float, experiments: tuple[Tensor, Tensor]) -> list[float]:
    """Return, for each n in T95, the share of experiments in which n seeds find a difference above 0.

    Args:
        difference, spread: true mean and standard deviation of the paired differences.
        experiments: from `standard_experiments`.
    """
    means, stds = experiments
    errors = torch.tensor([t / sqrt(n) for n, t in T95.items()])[:, None]
    return (difference + spread * means > errors * spread * stds).float().mean(1).tolist()


def tokens_until(run: RecordedRun, reward: float) -> float | None:
    """Return the tokens processed until the running mean of the reward first reaches this; None if it never does."""
    smooth = running_mean([row["reward"] for row in run.metrics])
    return next((row["num_tokens"] for row, r in zip(run.metrics, smooth, strict=True) if r >= reward), None)


def best_of(model, tokenizer, *, prompts: int, draws: int, seed: int = 0) -> tuple[list[int], float]:
    """Return how many samples of each held-out prompt are right, and the mean number of tokens of a sample."""
    rows = countdown_dataset(prompts, split="held-out", seed=seed)
    texts = [rows[i]["prompt"] for i in range(prompts)]
    pad = pad_token_id(tokenizer, model)
    ids, mask = left_pad([encode_prompt(tokenizer, text) for text in texts], pad)
    uniforms = torch.rand(prompts * draws, 16, generator=torch.Generator().manual_seed(seed))
    rollouts = sample(model.eval(), ids, mask, num_generations=draws, uniforms=uniforms,
                      end_ids=end_token_ids(model, tokenizer), pad_id=pad)  # fmt: skip
    cut = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    completions = tokenizer.batch_decode([row[kept] for row, kept in cut], skip_special_tokens=True)
    right = countdown([text for text in texts for _ in range(draws)], completions)
    lengths = rollouts.completion_mask.sum(1).float()
    return [int(sum(right[i : i + draws])) for i in range(0, len(right), draws)], lengths.mean().item()


def pass_curve(counts: Sequence[int], draws: int, ks: Sequence[int]) -> list[float]:
    """Return, for each k, the share of prompts with at least one right answer among k: the mean of `pass_at_k`."""
    return [mean(pass_at_k(draws, correct, k) for correct in counts) for k in ks]


def short_run(model, tokenizer, K: int, *, steps: int, completions: int, seed: int = 0) -> list[StepRecord]:
    """Train for a few steps with this many completions each, K per prompt, without KL, which would need a reference."""
    config = GRPOConfig.preset(
        "pocket", num_generations_per_prompt=K, batch_size=completions // K, max_steps=steps, kl_coef=0.0, seed=seed,
        logging_steps=steps, save_steps=steps + 1, output_dir=tempfile.mkdtemp(), overwrite_output_dir=True,
    )  # fmt: skip
    problems = countdown_dataset(2048, seed=seed)
    return list(GRPOTrainer(model, None, countdown, tokenizer, config, problems).steps())


def _interval(
    ours: Tensor, theirs: Tensor, t: float, *, paired=True, ends=1.0, n=None, correct=1, sign=1, power=1
) -> Tensor:
    # the learner's function; by default the right one
    d = sign * (ours - theirs)
    spread = d.std(correction=correct) if paired else (ours.var() + theirs.var()).sqrt()
    half = ends * t * spread**power / sqrt(len(d) if n is None else n)
    return torch.stack([d.mean(), d.mean() - half, d.mean() + half])


check_paired_interval = Judge(
    contract="paired_interval(ours[n], theirs[n], t) -> [mean difference, low end, high end]; two tensors; t: Student's"
    " for n seeds",
    reference=lambda ours, theirs, t: _interval(ours, theirs, t),
    hint="First one difference per seed; then the mean of these, their standard deviation (n - 1), and its error.",
    cases=(
        Case("without any spread the interval is a point", [2.0, 3.0, 4.0], [1.0, 2.0, 3.0], t=4.303),
        Case("differences 1, 2, 3: mean 2, std 1", [3.0, 5.0, 7.0], [2.0, 3.0, 4.0], t=4.303),
        Case("if ours are lower, the difference is negative", [2.0, 3.0, 4.0], [3.0, 5.0, 7.0], t=4.303),
        Case("what seeds have in common does not widen the interval", [10.0, 51.0, 92.0], [9.0, 49.0, 89.0], t=4.303),
        Case("t is an argument: another n, another t", [1.0, 2.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 2.0, 1.0], t=2.776),
    ),
    diagnoses={
        "you compare the two groups, not seed by seed": lambda a, b, t: _interval(a, b, t, paired=False),
        "your standard deviation divides by n, not by n - 1": lambda a, b, t: _interval(a, b, t, correct=0),
        "you use the spread of one seed: the mean of n varies less, by sqrt(n)": lambda a, b, t: _interval(
            a, b, t, n=1
        ),
        "you divide by sqrt(n - 1): that belongs inside the std; the error of a mean has sqrt(n)": lambda a, b, t: (
            _interval(a, b, t, n=len(a) - 1)
        ),
        "you use the variance, not its root, the standard deviation": lambda a, b, t: _interval(a, b, t, power=2),
        "you divide by n, not by its root": lambda a, b, t: _interval(a, b, t, n=len(a) ** 2),
        "you use the normal 1.96: with a few seeds t is larger": lambda a, b, t: _interval(a, b, 1.96),
        "your difference has the wrong sign: ours minus theirs": lambda a, b, t: _interval(a, b, t, sign=-1),
        "you halve the interval: t · error goes to both sides": lambda a, b, t: _interval(a, b, t, ends=0.5),
        "you return the ends without the mean": lambda a, b, t: _interval(a, b, t)[1:],
    },
)
