"""What a run tells about itself: JSONL files, the meaning of each metric, and figures made from them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    "skipped_steps": "updates not applied so far, because the gradient was not finite",
    "step_time": "seconds for this step",
}
"""Every metric that a run logs. The names are TRL's, so that a learner can move on without relearning.

Four are defined more narrowly there: TRL 1.16 takes `reward_std` over the whole batch, counts completions instead of
tokens in `clip_ratio/*` where the ratio is per sequence, judges `frac_reward_zero_std` by the batch where rewards are
scaled by it, and averages over micro-batches. tests/test_trl.py shows each.
"""

# One colour for one quantity, everywhere; the palette of Okabe and Ito is safe for colour-blind readers.
COLOURS = {"reward": "#0072B2", "kl": "#D55E00", "entropy": "#009E73", "length": "#CC79A7", "zero_std": "#E69F00"}


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
    """One row for several steps: counters as they are last, largest and smallest of their kind, else the mean.

    A value that is not a number (a reward function that scored nothing) does not count.
    """
    last = {"step", "epoch", "num_tokens", "skipped_steps", "learning_rate"}
    names = dict.fromkeys(name for row in rows for name in row)
    result = {}
    for name in names:
        values = [row[name] for row in rows if name in row and not math.isnan(row[name])] or [math.nan]
        if name in last:
            result[name] = values[-1]
        elif name.endswith(("/max", "/max_length")):
            result[name] = max(values)
        elif name.endswith("/min_length"):
            result[name] = min(values)
        else:
            result[name] = math.fsum(values) / len(values)
    return result


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


def training_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> "Figure":
    """Reward, KL, entropy and length against the step, from the rows of metrics.jsonl.

    Faint: each row; strong: the mean of it and its neighbours. Made without pyplot, so that nothing is shown
    or kept open; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex=True)
    (reward, kl), (entropy, length) = panels

    _curve(reward, rows, "reward", COLOURS["reward"], "mean reward")
    _curve(reward, rows, "frac_reward_zero_std", COLOURS["zero_std"], "share of groups that teach nothing", "--")
    reward.set(title="Reward", ylabel="reward; share of groups")
    if reward.lines:
        reward.legend(frameon=False)
    _curve(kl, rows, "kl", COLOURS["kl"])
    kl.set(title="KL to the reference", ylabel="nats per token")
    if rows and not any("kl" in row for row in rows):
        kl.text(0.5, 0.5, "not computed: kl_coef = 0", ha="center", va="center", transform=kl.transAxes)
    _curve(entropy, rows, "entropy", COLOURS["entropy"])
    entropy.set(title="Entropy of the next token", ylabel="nats", xlabel="optimizer step")
    _curve(length, rows, "completions/mean_length", COLOURS["length"])
    length.set(title="Completion length", ylabel="tokens", xlabel="optimizer step")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        low, high = min(0.0, panel.get_ylim()[0]), panel.get_ylim()[1]
        panel.set_ylim(low, high + 0.05 * (high - low))
    return figure


def _curve(panel, rows, name: str, colour: str, label: str | None = None, line: str = "-") -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        panel.plot(steps, values, color=colour, linewidth=1.0, alpha=0.35)
        panel.plot(steps, running_mean(values), line, color=colour, linewidth=2.0, label=label)


def running_mean(values: Sequence[float], reach: int = 3) -> list[float]:
    """Each value averaged with up to `reach` neighbours on either side.

    >>> running_mean([0.0, 3.0, 6.0], reach=1)
    [1.5, 3.0, 4.5]
    """
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]
