"""Write the cards of the recorded runs: what was run, the curves, the figures before and after, and what one sees.

    python benchmarks/cards.py

A card is a page and a picture in runs/, one for each group of runs; runs/README.md lists them. Every number on a page
is read from the runs' files, those in the sentences too, and a sentence that the numbers no longer bear out is refused.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from record import RUNS

from grpo_lab.course.comparison import COLOURS, comparison_figure
from grpo_lab.course.recorded import RecordedRun, recorded_runs
from grpo_lab.training.figures import running_mean

Stats = dict[str, dict[str, float]]
Runs = dict[str, list[RecordedRun]]
LAST = 10  # steps over which "at last" is averaged
TITLES = {
    "clip_ratio/region_mean": "Share of tokens whose gradient the clip has cut",
    "rewards/part_marks/mean": "What is paid: the hackable reward",
    "rewards/countdown/mean": "What is meant: share of right answers",
}  # where the meaning in `grpo_lab.training.metrics.METRICS` is too general for the run
USUAL = ("reward", "kl", "entropy", "frac_reward_zero_std")


@dataclass(frozen=True)
class Card:
    """A group of runs, and what one sees in them."""

    title: str
    question: str
    members: dict[str, str]
    """What a run is called in picture and table -> its name in runs/."""
    seen: Sequence[tuple[str, Callable[[Stats], bool]]]
    """A sentence with places for numbers, and what must hold for it to be true. See `statistics`."""
    metrics: Sequence[str] = USUAL
    panels: bool = False
    """A small panel for each run instead of one line for each."""


def rows_of(runs: Runs) -> dict[str, list]:
    """Rows of metrics by label, one list for each seed."""
    return {label: [run.metrics for run in seeds] for label, seeds in runs.items()}


def beside_the_first(runs: Runs) -> Figure:
    """A panel for each run: its reward in colour, that of the first run in grey."""
    healthy, *others = rows_of(runs).items()
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    for panel, (label, seeds) in zip(figure.subplots(3, 4, sharex=True, sharey=True).flat, others, strict=True):
        for name, rows, colour in ((healthy[0], healthy[1][0], "#999999"), (label, seeds[0], COLOURS[0])):
            steps = [row["step"] for row in rows]
            panel.plot(steps, running_mean([row["reward"] for row in rows]), color=colour, linewidth=1.8, label=name)
        panel.set_title(f"exhibit {label}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_ylim(0, 1)
        panel.set(xlabel="optimizer step", ylabel="reward")
        panel.label_outer()
    figure.legend(figure.axes[0].lines, [healthy[0], "exhibit"], loc="outside lower center", ncols=2, frameon=False)
    return figure


VARIANTS = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo", "reinforce")
CLIPPED = tuple(name for name in VARIANTS if name not in ("gspo", "cispo"))
CARDS: dict[str, Card] = {
    "pocket": Card(
        "The default run on the pocket model, five seeds",
        "Does it learn, and how much of it is luck?",
        {"pocket": "pocket"},
        [
            (
                "It learns: right answers rise from {r[pocket][before]:.1%} to {r[pocket][after]:.1%} of held-out "
                "problems, and the five seeds end between {r[pocket][lowest]:.1%} and {r[pocket][highest]:.1%}.",
                lambda r: r["pocket"]["lowest"] > 2 * r["pocket"]["before"],
            ),
            (
                "Most of it happens early: the reward is {r[pocket][reward at first]:.2f} over the first {n} steps, "
                "{r[pocket][reward half way]:.2f} over the {n} before the middle, {r[pocket][reward at last]:.2f} over "
                "the last {n}.",
                lambda r: r["pocket"]["reward half way"] > 0.9 * r["pocket"]["reward at last"],
            ),
            (
                "The policy grows sure of itself, its entropy falling to {r[pocket][entropy at last]:.3f} nats, and "
                "with it the share of groups that teach nothing rises to "
                "{r[pocket][frac_reward_zero_std at last]:.0%}: at the end one problem in six still gives a gradient.",
                lambda r: 0.8 < r["pocket"]["frac_reward_zero_std at last"] < 0.87,
            ),
            (
                "The KL to the reference is what differs most between seeds: it leaps, up to "
                "{r[pocket][kl at most]:.1f} nats per token in a single step, while reward and accuracy stay close "
                "together.",
                lambda r: r["pocket"]["kl spread"] > 10 * r["pocket"]["reward spread"],
            ),
        ],
    ),
    "K": Card(
        "K, the completions per problem, with 128 completions per step",
        "Is it better to ask few problems often, or many problems twice?",
        {f"K = {K}": "pocket" if K == 8 else f"K-{K}" for K in (2, 4, 8, 16, 32)},
        [
            (
                "From K = 2 to 16 it hardly matters here: accuracy after training is "
                "{r[K = 2][after]:.1%}, {r[K = 4][after]:.1%}, {r[K = 8][after]:.1%} and {r[K = 16][after]:.1%}, and "
                "the seeds of one K differ by as much.",
                lambda r: (
                    max(r[f"K = {K}"]["after"] for K in (2, 4, 8, 16))
                    - min(r[f"K = {K}"]["after"] for K in (2, 4, 8, 16))
                    < max(r[f"K = {K}"]["highest"] - r[f"K = {K}"]["lowest"] for K in (2, 4, 8, 16))
                ),
            ),
            (
                "K = 32, which leaves four problems a step, comes last with {r[K = 32][after]:.1%}; its best seed "
                "({r[K = 32][highest]:.1%}) is still within the range of the others.",
                lambda r: (
                    r["K = 32"]["after"] == min(v["after"] for v in r.values())
                    and r["K = 32"]["highest"] > min(v["lowest"] for k, v in r.items() if k != "K = 32")
                ),
            ),
            (
                "A large group rarely agrees: at the beginning {r[K = 2][frac_reward_zero_std at first]:.0%} of the "
                "groups of two teach nothing, of thirty-two {r[K = 32][frac_reward_zero_std at first]:.0%}; at the "
                "end {r[K = 2][frac_reward_zero_std at last]:.0%} and {r[K = 32][frac_reward_zero_std at last]:.0%}.",
                lambda r: all(
                    r[f"K = {K}"][f"frac_reward_zero_std at {when}"]
                    > r[f"K = {2 * K}"][f"frac_reward_zero_std at {when}"]
                    for K in (2, 4, 8, 16)
                    for when in ("first", "last")
                ),
            ),
        ],
    ),
    "beta": Card(
        "β, the weight of the KL penalty",
        "What does it cost to stay near the reference?",
        {f"β = {beta:g}": "pocket" if beta == 0.02 else f"beta-{beta:g}" for beta in (0, 0.02, 0.1, 0.5, 2)},
        [
            (
                "The stronger the penalty, the less is learned: accuracy after training is {r[β = 0][after]:.1%} "
                "without one, then {r[β = 0.02][after]:.1%}, {r[β = 0.1][after]:.1%}, {r[β = 0.5][after]:.1%} and "
                "{r[β = 2][after]:.1%}.",
                lambda r: [v["after"] for v in r.values()] == sorted((v["after"] for v in r.values()), reverse=True),
            ),
            (
                "The default of 0.02 costs next to nothing beside 0: less than its five seeds differ.",
                lambda r: (
                    r["β = 0"]["after"] - r["β = 0.02"]["after"] < r["β = 0.02"]["highest"] - r["β = 0.02"]["lowest"]
                ),
            ),
            (
                "At 0.5 and 2 the run settles where penalty and reward balance: the KL stays at "
                "{r[β = 0.5][kl at last]:.3f} and {r[β = 2][kl at last]:.3f} nats per token, the entropy at "
                "{r[β = 0.5][entropy at last]:.2f} and {r[β = 2][entropy at last]:.2f}, and at 2 hardly more groups "
                "agree than at the beginning ({r[β = 2][frac_reward_zero_std at last]:.0%}).",
                lambda r: (
                    r["β = 2"]["kl at last"] < r["β = 0.5"]["kl at last"] < r["β = 0.1"]["kl at last"]
                    and r["β = 2"]["frac_reward_zero_std at last"] < 1.2 * r["β = 2"]["frac_reward_zero_std at first"]
                ),
            ),
            (
                "Without a penalty no KL is computed, so that its panel has no line for β = 0.",
                lambda r: "kl at last" not in r["β = 0"],
            ),
        ],
    ),
    "presets": Card(
        "The eight variants, with two updates per rollout",
        "Which variant is the best?",
        {name: f"preset-{name}" for name in VARIANTS},
        [
            (
                "None stands out on this task: accuracy after training lies between {lowest:.1%} and {highest:.1%} "
                "(means of three seeds), and the seeds of one variant differ by up to {widest:.1%}.",
                lambda r: (
                    max(v["after"] for v in r.values()) - min(v["after"] for v in r.values())
                    < max(v["highest"] - v["lowest"] for v in r.values())
                ),
            ),
            (
                "What differs is how they work: GSPO's narrow range on whole completions cuts "
                "{r[gspo][clip_ratio/region_mean at first]:.0%} of the tokens at first, where GRPO's cuts "
                "{r[grpo][clip_ratio/region_mean at first]:.1%}; CISPO caps weights at 5 and never gets there.",
                lambda r: (
                    r["cispo"]["clip_ratio/region_mean at first"] == 0
                    and all(
                        r["gspo"]["clip_ratio/region_mean at first"] > 5 * r[name]["clip_ratio/region_mean at first"]
                        for name in CLIPPED
                    )
                ),
            ),
            (
                "The teeth of its curve are the two updates: at the first of each rollout the ratio is 1 and nothing "
                "is cut.",
                lambda r: (
                    r["gspo"]["clip_ratio/region_mean at odd steps"] == 0 < r["gspo"]["clip_ratio/region_mean at last"]
                ),
            ),
            (
                "Gradients have other sizes by an order of magnitude ({r[rloo][grad_norm at first]:.1f} with RLOO, "
                "which sums over a completion, {r[dr_grpo][grad_norm at first]:.2f} with Dr. GRPO, which divides by "
                "the longest that is allowed), which AdamW and the limit of 1 on the norm make equal again.",
                lambda r: r["rloo"]["grad_norm at first"] > 10 * r["dr_grpo"]["grad_norm at first"],
            ),
            (
                "REINFORCE, without a baseline, grows sure the fastest, with {r[reinforce][entropy at last]:.3f} nats "
                "at last.",
                lambda r: r["reinforce"]["entropy at last"] == min(v["entropy at last"] for v in r.values()),
            ),
        ],
        metrics=("reward", "entropy", "clip_ratio/region_mean", "grad_norm"),
    ),
    "collapse-hacked-reward": Card(
        "Collapse: β = 0 and a reward that can be hacked",
        "What if the reward pays for something else than what is meant?",
        {"hackable reward, β = 0": "collapse-hacked-reward", "pocket": "pocket"},
        [
            (
                "The reward soars, from {r[hackable reward, β = 0][rewards/part_marks/mean at first]:.1f} over the "
                "first {n} steps to {r[hackable reward, β = 0][rewards/part_marks/mean at last]:.1f} over the last, "
                "while right answers fall from {r[hackable reward, β = 0][before]:.1%} to "
                "{r[hackable reward, β = 0][after]:.1%}.",
                lambda r: r["hackable reward, β = 0"]["after"] < 0.5 * r["hackable reward, β = 0"]["before"],
            ),
            (
                "The reward is the share of the target that was reached, without an upper limit, so the policy "
                "multiplies: see its completions below.",
                lambda r: r["hackable reward, β = 0"]["rewards/part_marks/mean at last"] > 2,
            ),
            (
                "Nothing else looks ill: the entropy falls as in the healthy run, and the reward alone would pass for "
                "success. Only the second reward, which pays nothing and watches, tells.",
                lambda r: r["hackable reward, β = 0"]["entropy at last"] < 0.1,
            ),
        ],
        metrics=("rewards/part_marks/mean", "rewards/countdown/mean", "entropy", "frac_reward_zero_std"),
    ),
    "collapse-learning-rate": Card(
        "Collapse: a learning rate that is too high",
        "What does a learning rate of 0.02 do, 33 times the default?",
        {"learning rate 0.02": "collapse-learning-rate", "pocket": "pocket"},
        [
            (
                "The reward is soon gone and never returns: {r[learning rate 0.02][reward at first]:.2f} over the "
                "first {n} steps, {r[learning rate 0.02][reward at last]:.3f} over the last, "
                "{r[learning rate 0.02][after]:.1%} right on held-out problems.",
                lambda r: r["learning rate 0.02"]["reward at last"] < 0.01,
            ),
            (
                "KL and entropy say why: the KL reaches {r[learning rate 0.02][kl at most]:.0f} nats per token, "
                "and the entropy rises to {r[learning rate 0.02][entropy at last]:.2f} nats, where that of a run that "
                "learns falls. The answers below no longer use the numbers of the problem.",
                lambda r: (
                    r["learning rate 0.02"]["kl at most"] > 5
                    and r["learning rate 0.02"]["entropy at last"] > r["learning rate 0.02"]["entropy at first"]
                ),
            ),
            (
                "Without a right answer no group has anything to compare "
                "({r[learning rate 0.02][frac_reward_zero_std at last]:.0%} of them teach nothing), so the advantages "
                "are zero and only the KL pulls, too weakly to lead back.",
                lambda r: r["learning rate 0.02"]["frac_reward_zero_std at last"] > 0.95,
            ),
        ],
        metrics=("reward", "kl", "entropy", "grad_norm"),
    ),
    "collapse-wrong-sign-kl": Card(
        "Collapse: the KL with the wrong sign",
        "What if the policy is paid for leaving the reference?",
        {"wrong sign, β = 1": "collapse-wrong-sign-kl", "pocket": "pocket"},
        [
            (
                "It learns at first, {r[wrong sign, β = 1][reward at most]:.2f} at its best step, and then "
                "the pay for distance wins: {r[wrong sign, β = 1][reward at last]:.3f} over the last {n} steps, "
                "{r[wrong sign, β = 1][after]:.1%} right.",
                lambda r: r["wrong sign, β = 1"]["reward at most"] > 0.5 > r["wrong sign, β = 1"]["reward at last"],
            ),
            (
                "One look at the KL would do: an estimate by k3 cannot be negative, and this one is, with "
                "{r[wrong sign, β = 1][kl at first]:.2f} nats per token over the first {n} steps and "
                "{r[wrong sign, β = 1][kl at last]:.1f} over the last.",
                lambda r: r["wrong sign, β = 1"]["kl at last"] < r["wrong sign, β = 1"]["kl at first"] < 0,
            ),
            (
                "The completions shrink from {r[wrong sign, β = 1][completions/mean_length at first]:.1f} to "
                "{r[wrong sign, β = 1][completions/mean_length at last]:.1f} tokens: two numbers and the end, where "
                "three numbers are asked for.",
                lambda r: (
                    r["wrong sign, β = 1"]["completions/mean_length at last"]
                    < r["wrong sign, β = 1"]["completions/mean_length at first"] - 1
                ),
            ),
        ],
        metrics=("reward", "kl", "entropy", "completions/mean_length"),
    ),
    "museum": Card(
        "The bug museum: one wrong line each",
        "Which of these runs has which bug? Notebook 10 asks; this page does not tell.",
        {"healthy": "museum/healthy", **{letter: f"museum/{letter}" for letter in "ABCDEFGHIJKL"}},
        [
            (
                "Most wrong lines do not show in the result: {near} of the twelve end within ten points of the healthy "
                "run's {r[healthy][after]:.1%}, or above it.",
                lambda r: sum(v["after"] > r["healthy"]["after"] - 0.1 for v in r.values()) > 7,
            ),
            (
                "Three stay near where all began, and one stops half way: G, K and L end at {r[G][after]:.1%}, "
                "{r[K][after]:.1%} and {r[L][after]:.1%}, D at {r[D][after]:.1%}.",
                lambda r: all(r[x]["after"] < 0.3 for x in "GKL") and 0.4 < r["D"]["after"] < 0.6,
            ),
            (
                "A bug can even look like a gain: {best} ends with {highest:.1%}, after sixty steps that are too few "
                "for the healthy run to finish.",
                lambda r: max(v["after"] for v in r.values()) > r["healthy"]["after"] + 0.05,
            ),
        ],
        panels=True,
    ),
}


def statistics(runs: Runs) -> Stats:
    """What the sentences are made of, by label: means over seeds.

    `before`, `after`: share of held-out problems answered rightly (sampled); `lowest`, `highest`: of the seeds after.
    Of each metric: "at first" and "at last" (over LAST steps), "half way" (the LAST before the middle), "at most" (of
    any row), "at odd steps" (of two updates per rollout the first), and "spread" (highest less lowest seed at last, as
    a share of the mean).
    """
    result: Stats = {}
    for label, seeds in runs.items():
        after = [run.info["after"]["eval/pass@1"] for run in seeds]
        values = {"after": fmean(after), "lowest": min(after), "highest": max(after)}
        if all("before" in run.info for run in seeds):
            values["before"] = fmean(run.info["before"]["eval/pass@1"] for run in seeds)
        for name in seeds[0].metrics[-1]:
            lines = [[row[name] for row in run.metrics if name in row] for run in seeds]
            middle = len(lines[0]) // 2
            for when, part in (("first", slice(LAST)), ("last", slice(-LAST, None))):
                values[f"{name} at {when}"] = fmean(fmean(line[part]) for line in lines)
            values[f"{name} half way"] = fmean(fmean(line[middle - LAST : middle]) for line in lines)
            values[f"{name} at odd steps"] = fmean(fmean(line[::2]) for line in lines)
            values[f"{name} at most"] = max(max(line) for line in lines)
            ends = [fmean(line[-LAST:]) for line in lines]
            values[f"{name} spread"] = (max(ends) - min(ends)) / abs(fmean(ends) or 1)
        result[label] = values
    return result


def read(card: Card) -> Runs:
    """The runs of a card, by label."""
    return {label: recorded_runs(name, RUNS) for label, name in card.members.items()}


def sentences(card: Card, runs: Runs) -> str:
    """What one sees, with the numbers put in. Raises: ValueError for a sentence that is no longer true."""
    r = statistics(runs)
    ends = {label: values["after"] for label, values in r.items()}
    more = {
        "n": LAST, "lowest": min(ends.values()), "highest": max(ends.values()), "best": max(ends, key=ends.get),
        "widest": max(v["highest"] - v["lowest"] for v in r.values()),
        "near": sum(value > next(iter(ends.values())) - 0.1 for value in list(ends.values())[1:]),
    }  # fmt: skip
    for text, holds in card.seen:
        if not holds(r):
            raise ValueError(f"this is no longer what one sees; look at the runs and write anew: {text}")
    return "\n".join(text.format(r=r, **more) for text, _ in card.seen)


def draw(card: Card, runs: Runs) -> Figure:
    """The picture, which says of itself that it is recorded."""
    if card.panels:
        picture = beside_the_first(runs)
    else:
        picture = comparison_figure(rows_of(runs), card.metrics)
        for panel, metric in zip(picture.axes, card.metrics, strict=True):
            panel.set_title(TITLES.get(metric, panel.get_title()), fontsize=10)
    few, many = min(len(seeds) for seeds in runs.values()), max(len(seeds) for seeds in runs.values())
    seeds = "1 seed" if many == 1 else f"{many} seeds" if few == many else f"{few} to {many} seeds"
    picture.suptitle(f"{seeds}, pocket model; {next(iter(runs.values()))[0].label}", fontsize=9, color="#555555")
    return picture


def png(card: Card, runs: Runs) -> bytes:
    """The picture in 256 colours, which is smaller, with a checksum of its data, so that a test knows an old one."""
    full, small, stamp = BytesIO(), BytesIO(), PngInfo()
    draw(card, runs).savefig(full, dpi=100)
    stamp.add_text("Source", checksum(card, runs))
    few = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True, pnginfo=stamp)
    return small.getvalue()


def checksum(card: Card, runs: Runs) -> str:
    """Of everything that the picture shows."""
    shown = [(label, [run.metrics for run in seeds]) for label, seeds in runs.items()]
    return f"{zlib.crc32(repr((shown, card.metrics, TITLES)).encode()):08x}"


def percent(values: Sequence[float]) -> str:
    """Mean and range over the seeds; of one seed its value."""
    mean = f"{fmean(values):.1%}"
    return f"{mean} ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else mean


def changes(info: dict) -> str:
    """What differs from the preset pocket."""
    return ", ".join(f"`{name}` {value}" for name, value in info["changed"].items()) or "nothing"


def table(runs: Runs, card: Card) -> str:
    """A row for each run, its seeds linked; what all change alike is said once, above."""
    changed = {label: changes(seeds[0].info) for label, seeds in runs.items()}
    alike = len(changed) > 1 and len(set(changed.values())) == 1
    lines = [f"All differ from the preset `pocket` in {next(iter(changed.values()))}.", ""] if alike else []
    head = [
        "run",
        *([] if alike else ["differs from the preset `pocket` in"]),
        "right before",
        "after",
        "each seed, after",
    ]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for label, seeds in runs.items():
        before = [run.info["before"]["eval/pass@1"] for run in seeds if "before" in run.info]
        after = [run.info["after"]["eval/pass@1"] for run in seeds]
        links = ", ".join(
            f"[{value:.1%}]({card.members[label]}-seed{run.info['seed']})"
            for run, value in zip(seeds, after, strict=True)
        )
        cells = [label, *([] if alike else [changed[label]]), percent(before) if before else "not measured"]
        lines.append(f"| {' | '.join([*cells, percent(after), links])} |")
    return "\n".join(lines)


def samples(runs: Runs) -> str:
    """Of each run's first seed: what it answered to one problem, at the first step recorded and at the last."""
    lines = ["| run | step | problem | completions, how often, and their reward |", "| --- | --- | --- | --- |"]
    for label, (run, *_) in runs.items():
        for step in (run.completions[0]["step"], run.completions[-1]["step"]):
            rows = [row for row in run.completions if row["step"] == step]
            group = Counter((r["completion"], r["reward"]) for r in rows if r["prompt"] == rows[0]["prompt"])
            words = ", ".join(f"`{text}` {number} × {reward:.3g}" for (text, reward), number in group.most_common(4))
            more = f", and {len(group) - 4} more" if len(group) > 4 else ""
            lines.append(f"| {label} | {step} | `{rows[0]['prompt']}` | {words}{more} |")
    return "\n".join(lines)


def circumstances(runs: Runs) -> str:
    """Command, seeds, commit, device, versions and date, as the runs' files say them."""
    infos = [run.info for seeds in runs.values() for run in seeds]

    def of_all(get: Callable[[dict], str]) -> str:
        return "; ".join(dict.fromkeys(get(info) for info in infos))

    commands = list(dict.fromkeys(info["command"] for info in infos))
    together = f"{' '.join(commands[0].split()[:2])} {' '.join(command.split()[-1] for command in commands)}"
    seeds = {label: ", ".join(str(run.info["seed"]) for run in s) for label, s in runs.items()}
    same = len(set(seeds.values())) == 1
    rows = {
        "command": f"`{together}`",
        "seeds": next(iter(seeds.values())) if same else "; ".join(f"{label}: {s}" for label, s in seeds.items()),
        "commit": of_all(lambda i: i.get("commit", "not recorded")),
        "device": of_all(lambda i: i["device"]),
        "versions": of_all(lambda i: ", ".join(f"{name} {version}" for name, version in i["versions"].items())),
        "date": of_all(lambda i: i["date"]),
        "seconds per run": f"{min(i['seconds'] for i in infos):.0f} to {max(i['seconds'] for i in infos):.0f}",
    }
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def page(name: str, card: Card, runs: Runs) -> str:
    """The card's Markdown."""
    folders = " ".join(f"runs/{member}-seed*" for member in card.members.values())
    return f"""# {card.title}

{card.question} Everything here is recorded; nothing was run for this page.

{circumstances(runs)}

![{card.title}: recorded curves]({name}.png)

## What one sees

{sentences(card, runs)}

## Before and after

Right: the share of held-out problems answered rightly, sampled as in training; mean, and range of the seeds.

{table(runs, card)}

## Completions

Of the first seed, to the first problem of its first recorded step and of its last; 3 × 1: three with a reward of 1.

{samples(runs)}

The curves anew: `grpo-lab plot {folders}{"" if card.panels else " --metrics " + " ".join(card.metrics)}`.
"""


def index() -> str:
    """runs/README.md: a line for each card."""
    lines = []
    for name, card in CARDS.items():
        runs = read(card)
        after = [run.info["after"]["eval/pass@1"] for seeds in runs.values() for run in seeds]
        number = sum(len(seeds) for seeds in runs.values())
        lines.append(
            f"| [{card.title}]({name}.md) | {card.question} | {number} | {min(after):.1%} to {max(after):.1%} |"
        )
    rows = "\n".join(lines)
    infos = [run.info for card in CARDS.values() for seeds in read(card).values() for run in seeds]
    device = " and ".join(sorted({info["device"] for info in infos}))
    return f"""# Recorded runs

Runs of the pocket model that were made once and kept, for the notebooks to show and for you to compare with. Each
folder is one run with one seed: `run.json` (command, settings, seed, commit, device, versions, date, accuracy before
and after), `metrics.jsonl` (a row per step) and `completions.jsonl` (a sample). A card per group says what one sees.

| card | question | runs on it | right after training, worst and best run |
| --- | --- | --- | --- |
{rows}

`python benchmarks/record.py` and `benchmarks/museum.py` make the runs, `benchmarks/cards.py` these pages. All were made
on {device}. Of the five `pocket` runs, made anew on 2026-11-26, every step has the same reward
and the greedy accuracies are the same; the sampled ones come out up to two points higher or lower, because evaluation
has drawn other random numbers since.

The museum's runs do not say their commit, nor all settings (`changed` over the preset `pocket` is all there is to know)
and were not evaluated before training: that is the pocket model, as in all others.
"""


def main() -> None:
    """Write all pages and pictures."""
    for name, card in CARDS.items():
        runs = read(card)
        (RUNS / f"{name}.md").write_text(page(name, card, runs), encoding="utf-8")
        (RUNS / f"{name}.png").write_bytes(png(card, runs))
        print(f"{name}: {(RUNS / f'{name}.png').stat().st_size / 1000:.0f} kB")
    (RUNS / "README.md").write_text(index(), encoding="utf-8")


if __name__ == "__main__":
    main()
