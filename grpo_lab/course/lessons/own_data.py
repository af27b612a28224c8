"""Notebook 08: a second reward from a column of the data, its judge, and the effect of reward weights."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from grpo_lab.course.checks import Case, Judge
from grpo_lab.tasks.countdown import countdown_dataset, countdown_expressions
from grpo_lab.training.figures import running_mean

FIRST, RIGHT = "#56B4E9", "#0072B2"  # Okabe and Ito's


def smaller_factors(size: int) -> dict[str, int]:
    """Return Countdown prompts solved by a product and a sum, such as 5*3+7, with the smaller factor of each.

    Returns: prompt -> the smaller factor, for the first `size` such prompts of the training set.

    >>> smaller_factors(1)
    {'3,8,9:35=': 3}
    """
    found = {}
    for prompt in countdown_dataset(2048).columns["prompt"]:
        numbers, target = re.fullmatch(r"(.*):(\d+)=", prompt).groups()
        answers = countdown_expressions(tuple(sorted(map(int, numbers.split(",")))))[int(target)]
        product = re.fullmatch(r"(\d)\*(\d)\+\d", answers[0])
        if len(answers) == 1 and product and product[1] != product[2]:
            found[prompt] = int(product[2])
    return dict(list(found.items())[:size])


def begins_with(prompts: Sequence[str], completions: Sequence[str], first: Sequence) -> list[float]:
    """Return 1 if the first number of the completion is that of the column, else 0.

    >>> begins_with(["3,5,7:22="] * 2, ["3*5+7", "5*3+7"], first=[3, 3])
    [1.0, 0.0]
    """
    return _each(lambda text, wanted: _number(text) == str(wanted))(prompts, completions, first)


def _number(text: str) -> str:
    return (re.match(r"\d+", text) or [""])[0]


def _each(right) -> Any:
    return lambda prompts, completions, first: [float(right(c, f)) for c, f in zip(completions, first, strict=True)]


judge = Judge(
    contract="begins_with(prompts, completions, first) -> list of 1.0 or 0.0: is the first number that of the column?",
    reference=begins_with,
    hint="Read the digits at the start of each completion, and compare like with like: text with text.",
    cases=(
        Case("a completion that begins with the number of its column earns 1", ("3,5,7:22=",), ("3*5+7",), (3,)),
        Case("one that begins with another number earns 0", ("3,5,7:22=",), ("5*3+7",), (3,)),
        Case("each completion has its own number", ("3,5,7:22=", "5,9,2:47="), ("3*5+7", "5*9+2"), (3, 5)),
        Case("the number must come first, not somewhere", ("3,5,7:22=",), ("7+3*5",), (3,)),
        Case(
            "the completion may be empty",
            ("3,5,7:22=",),
            ("",),
            (3,),
            stumbles="an empty completion has no first character",
        ),
        Case("35 is one number, not a 3 and a 5", ("3,5,7:42=",), ("35+7",), (3,)),
    ),
    diagnoses={
        "you compare text with a number: '3' == 3 is False": _each(lambda text, wanted: _number(text) == wanted),
        "you accept the number anywhere in the text": _each(lambda text, wanted: str(wanted) in text),
        "you compare all with the first row's number": lambda p, c, f: begins_with(p, c, list(f)[:1] * len(c)),
        "35 begins with the character 3, but not with the number 3": _each(lambda t, wanted: t.startswith(str(wanted))),
        "right and wrong are swapped": lambda *a: [1 - r for r in begins_with(*a)],
    },
)


def draw_weights(figure: Figure, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw the two rewards of each run against the step, one panel per run; state the mean of the last five steps."""
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.17, top=0.88, wspace=0.16)
    lines = []
    for panel, (title, rows) in zip(figure.subplots(1, len(runs), sharey=True), runs.items(), strict=True):
        last = []
        names = [name for name in rows[0] if name.startswith("rewards/")]
        for name, colour, style in zip(names, (RIGHT, FIRST), ("-", "--"), strict=True):
            values = [row[name] for row in rows]
            steps = [row["step"] for row in rows]
            panel.plot(steps, values, style, color=colour, linewidth=1, alpha=0.4)
            panel.plot(steps, running_mean(values), style, color=colour, linewidth=2.2, label=name.split("/")[1])
            last.append(f"{name.split('/')[1]} {sum(values[-5:]) / 5:.2f}")
        panel.set(title=title, xlabel="optimizer step", ylim=(0, 1))
        panel.spines[["top", "right"]].set_visible(False)
        lines.append(f"{title}; last five steps: {', '.join(last)}")
    figure.axes[0].set_ylabel("mean reward, unweighted")
    figure.axes[0].legend(frameon=False, loc="center right")
    return "\n".join(lines)
