"""`grpo-lab plot`: draw several runs in one figure."""

import argparse
from pathlib import Path


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "plot",
        help="draw several runs in one figure",
        description="Draw several runs in one figure. Folders whose names differ only in -seed0, -seed1, … are seeds "
        "of one run: the line is their mean, and the shaded area goes from the lowest to the highest.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an output folder of train, or a recorded run")
    parser.add_argument("--output", default="comparison.png", metavar="FILE.png", help="default: comparison.png")
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="default: reward kl entropy completions/mean_length"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Draw the runs, and print the first and last value of each curve."""
    if Path(options.output).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output must end in .png, .svg or .pdf, got {options.output!r}.")
    from grpo_lab.course.comparison import DEFAULT_METRICS, comparison_figure, logged, read_runs, summary

    runs = read_runs(options.runs)
    available = logged(runs)
    metrics = list(dict.fromkeys(options.metrics or [name for name in DEFAULT_METRICS if name in available]))
    if not metrics:
        raise ValueError(
            f"none of {', '.join(DEFAULT_METRICS)} is in these runs. --metrics takes {', '.join(available)}."
        )
    figure = comparison_figure(runs, metrics)
    try:
        figure.savefig(options.output, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {options.output} ({error.strerror}). Name another file: --output.") from None
    print(summary(runs, metrics))
    if missing := [name for name in DEFAULT_METRICS if not options.metrics and name not in metrics]:
        print(f"Not drawn, because no run has it: {', '.join(missing)}")
    print(f"Written to {options.output}: {', '.join(metrics)}")
    return 0
