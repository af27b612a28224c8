"""The entry point: run the command, and report what went wrong in one sentence."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from grpo_lab import __version__
from grpo_lab.cli import course, doctor, plan, plot, pretrain, train

COMMANDS = (train, plan, pretrain, plot, doctor, course)
EXPECTED_ERRORS = (ValueError, TypeError, OSError, MemoryError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; an error is reported in one sentence, with --debug as a traceback.

    0: done. 1: `plan` or `doctor` found a problem, or there is a bug. 2: the user can correct it. 130: interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write characters that the terminal cannot encode
    options = make_parser().parse_args(arguments)
    try:
        _refuse_empty(options)
        # only rank 0 prints; the other ranks report only the error that stops them
        quiet = redirect_stdout(io.StringIO()) if _rank() > 0 else nullcontext()
        with warnings.catch_warnings(), quiet:
            warnings.showwarning = _show_warning
            return options.run(options)
    except KeyboardInterrupt as interrupt:
        resume = f": {interrupt}. Go on with the same command and --resume" if str(interrupt) else ""
        print(f"\ngrpo-lab: stopped{resume}.", file=sys.stderr)
        return 130
    except EXPECTED_ERRORS as error:
        if options.debug:
            raise
        print(f"{_program()}: {_one_sentence(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # a bug of this package or of a library
        if options.debug:
            raise
        kind = type(error).__name__
        print(f"{_program()}: unexpected {kind}: {_one_sentence(error)} (--debug shows where)", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` in its result is the function of the command."""
    parser = argparse.ArgumentParser(
        prog="grpo-lab", description="Group Relative Policy Optimization, to learn and to use."
    )
    parser.add_argument("--version", action="version", version=f"grpo-lab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        command = module.add_parser(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


def _refuse_empty(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        if value == "" or (isinstance(value, list) and "" in value):
            flag = {"runs": "RUN", "folder": "FOLDER"}.get(name, "--" + name.replace("_", "-"))
            raise ValueError(f"{flag} is empty. Is a variable of the shell not set?")


def _one_sentence(error: Exception) -> str:
    parts = [" ".join(part.split()) for part in (str(error), *getattr(error, "__notes__", ()))]
    return " ".join(part if len(part) <= 1000 else f"{part[:999]}…" for part in parts)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))  # set by torchrun and accelerate launch


def _program() -> str:
    return f"grpo-lab, rank {_rank()}" if "RANK" in os.environ else "grpo-lab"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    from tqdm import tqdm

    of_this_rank = issubclass(category, RuntimeWarning)  # such as a reward that is slow on this rank's completions
    if _rank() == 0 or of_this_rank:
        program = _program() if of_this_rank else "grpo-lab"
        # tqdm.write prints above the progress bar instead of into it
        tqdm.write(f"{program}: {' '.join(str(message).split())}", file=sys.stderr)
