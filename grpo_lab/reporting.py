"""What a run tells about itself: JSONL files, the meaning of each metric, and figures made from them."""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    "sampling/importance_sampling_ratio/min": "smallest weight of a completion (or token) that vLLM sampled",
    "sampling/importance_sampling_ratio/mean": "mean of these weights: 1 if it samples as we score; capped above",
    "sampling/importance_sampling_ratio/max": "the largest of these",
    "skipped_steps": "updates not applied so far, because the gradient was not finite",
    "step_time": "seconds for this step",
    "eval/*_low": "lower end of its 95 % interval (Wilson)",
    "eval/*_high": "upper end of its 95 % interval (Wilson)",
    "eval/pass@1_greedy": "share of held-out prompts whose likeliest answer is right",
    "eval/pass@1": "share of sampled answers to held-out prompts that are right",
    "eval/pass@*": "share of held-out prompts with at least one right answer among so many sampled ones",
    "eval/reward": "mean reward of sampled answers to held-out prompts",
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
    """One row for several steps: counters and evaluations as they are last, largest, smallest, else the mean.

    A value that is not a number (a reward function that scored nothing) does not count.
    """
    last = {"step", "epoch", "num_tokens", "skipped_steps", "learning_rate"}
    names = dict.fromkeys(name for row in rows for name in row)
    result = {}
    for name in names:
        values = [row[name] for row in rows if name in row and not math.isnan(row[name])] or [math.nan]
        if name in last or name.startswith("eval/"):
            result[name] = values[-1]
        elif name.endswith(("/max", "/max_length")):
            result[name] = max(values)
        elif name.endswith(("/min", "/min_length")):
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


def training_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> "Figure":
    """Reward, KL, entropy and length against the step, from the rows of metrics.jsonl.

    Faint: each row; strong: the mean of it and its neighbours; shaded: how far rewards within a group lie from their
    mean, cut at 0 and 1 where rewards seem to be shares. Made without pyplot, so that nothing is shown
    or kept open; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex=True)
    (reward, kl), (entropy, length) = panels

    _curve(reward, rows, "reward", COLOURS["reward"], "mean reward")
    _band(reward, rows, "reward", "reward_std", COLOURS["reward"], "± spread within a group")
    _curve(reward, rows, "frac_reward_zero_std", COLOURS["zero_std"], "share of groups that teach nothing", "--")
    reward.set(title="Reward", ylabel="reward; share of groups")
    if reward.lines:
        figure.legend(*reward.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
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


@dataclass(frozen=True)
class RecordedRun:
    """A run that was made before, from its folder in runs/."""

    info: dict[str, Any]
    """Of run.json: settings, seed, date, device, versions, accuracy before and after."""
    metrics: list[dict[str, Any]]
    completions: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """When and where, to stand beside everything that is drawn from it."""
        return f"recorded {self.info['date']} on {self.info['device']}, PyTorch {self.info['versions']['torch']}"


def recorded_runs(name: str, folder: str | Path | None = None) -> list[RecordedRun]:
    """The recorded runs of this name, one per seed, in the order of the seeds.

    Args:
        name: a folder's name in runs/ without its seed, such as "K-4".
        folder: runs/ itself; None looks for it in this folder, those above it, and beside the package.
    Raises: ValueError if there are none.
    """
    places = [Path(folder)] if folder else [p / "runs" for p in (*_here_and_above(), Path(__file__).parents[1])]
    found = next((paths for place in places if (paths := list(place.glob(f"{name}-seed*")))), [])
    if not found:
        raise ValueError(f"there is no recorded run {name!r} in {', '.join(map(str, places))}.")
    runs = [
        RecordedRun(
            json.loads((path / "run.json").read_text(encoding="utf-8")),
            JsonLines(path / "metrics.jsonl").read(),
            JsonLines(path / "completions.jsonl").read(),
        )
        for path in found
    ]
    return sorted(runs, key=lambda run: run.info["seed"])


def _here_and_above() -> list[Path]:
    here = Path.cwd()
    return [here, *here.parents]


def completions_table(rows: Sequence[Mapping[str, Any]], tokenizer=None) -> str:
    """Rows of completions.jsonl as an HTML table: prompt, completion, reward, advantage.

    With the tokenizer, and where the row has them, each token is shaded by its log-ratio to the reference.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.get("rewards", {})))
    names = names if len(names) > 1 else []  # one reward is the reward
    text, number = "padding:2px 2em 2px 0; text-align:left", "padding:2px 1em; text-align:right"
    head = {"prompt": text, "completion": text, **dict.fromkeys(("reward", *names, "advantage"), number)}
    lines = []
    for row in rows:
        parts = [row["rewards"].get(name) for name in names]
        cells = [
            f"<td style='{text}'><code>{_text(row['prompt'])}</code></td>",
            f"<td style='{text}'><code>{_completion(row, tokenizer)}</code></td>",
            *(f"<td style='{number}'>{'' if v is None else f'{v:.2f}'}</td>" for v in (row["reward"], *parts)),
            f"<td style='{number}; background:{_shade(row['advantage'] / 2)}'>{row['advantage']:+.2f}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(f"<th style='{style}'>{html.escape(title)}</th>" for title, style in head.items())
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    return html.escape(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def _completion(row: Mapping[str, Any], tokenizer) -> str:
    if tokenizer is None or "completion_ids" not in row or "ref_logprobs" not in row:
        return html.escape(row["completion"])
    ratios = [ours - theirs for ours, theirs in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
    return "".join(
        f"<span title='{ratio:+.2f} nats' style='background:{_shade(ratio / 3)}'>"
        f"{html.escape(tokenizer.decode([token]))}</span>"
        for token, ratio in zip(row["completion_ids"], ratios, strict=True)
    )


def _shade(value: float) -> str:
    """Blue for positive, orange for negative, clear for zero; full at 1."""
    strength = min(1.0, abs(value)) * 0.6
    return f"rgba(0,114,178,{strength:.2f})" if value >= 0 else f"rgba(230,159,0,{strength:.2f})"


def progress_bar(done: int, total: int, seconds_left: float) -> str:
    """How far a run is, as HTML."""
    share = done / total
    words = f"step {done} of {total}" + (f", about {seconds_left:.0f} s left" if done < total else "")
    return (
        "<div style='background:#ddd; width:320px; height:8px; border-radius:4px; margin:4px 0'>"
        f"<div style='background:{COLOURS['reward']}; width:{share:.0%}; height:8px; border-radius:4px'></div></div>"
        f"<div>{words}</div>"
    )


def _curve(panel, rows, name: str, colour: str, label: str | None = None, line: str = "-") -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        panel.plot(steps, values, color=colour, linewidth=1.0, alpha=0.35)
        panel.plot(steps, running_mean(values), line, color=colour, linewidth=2.0, label=label)


def _band(panel, rows, name: str, spread: str, colour: str, label: str) -> None:
    points = [row for row in rows if row.get(name) is not None and row.get(spread) is not None]
    if not points:
        return
    middle, width = (running_mean([row[key] for row in points]) for key in (name, spread))
    low, high = ([m + sign * w for m, w in zip(middle, width, strict=True)] for sign in (-1, 1))
    # no two numbers between 0 and 1 have an std (n - 1) above 0.71
    if all(0 <= row[name] <= 1 and row[spread] < 0.71 for row in points):
        low, high = [max(0.0, y) for y in low], [min(1.0, y) for y in high]
    panel.fill_between([row["step"] for row in points], low, high, color=colour, alpha=0.12, linewidth=0, label=label)


def running_mean(values: Sequence[float], reach: int = 3) -> list[float]:
    """Each value averaged with up to `reach` neighbours on either side.

    >>> running_mean([0.0, 3.0, 6.0], reach=1)
    [1.5, 3.0, 4.5]
    """
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]
