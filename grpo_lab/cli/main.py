"""The command line: `grpo-lab train`, `pretrain`, `plan`, `plot` and `doctor`, and what they print.

Every setting of GRPOConfig is a flag, and its docstring the flag's help. Imports of PyTorch wait until
they are needed, so that `--help` answers at once.
"""

import argparse
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from grpo_lab import __version__
from grpo_lab.rewards.isolated import require_package
from grpo_lab.tasks.gsm8k import check_numbers
from grpo_lab.tasks.registry import TASKS, find_task
from grpo_lab.tasks.task import Task
from grpo_lab.training.config import PRESETS, GRPOConfig, field_types

ALIASES = {"num_generations_per_prompt": ["--num-generations"]}  # the first is the one shown
EXPECTED_ERRORS = (ValueError, TypeError, OSError, MemoryError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What a user can mend is said in one sentence, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a model writes may not exist in the terminal's alphabet
    options = make_parser().parse_args(arguments)
    try:
        # of several processes one speaks; the others only say what stops them
        quiet = redirect_stdout(io.StringIO()) if _rank() > 0 else nullcontext()
        with warnings.catch_warnings(), quiet:
            warnings.showwarning = _say_warning
            return options.command(options)
    except KeyboardInterrupt as interrupt:
        print(f"\ngrpo-lab: stopped{_and_how_to_go_on(interrupt)}.", file=sys.stderr)
        return 130
    except EXPECTED_ERRORS as error:
        if options.debug:
            raise
        print(f"{_speaker()}: {_one_sentence(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # a fault of ours, or of a library
        if options.debug:
            raise
        print(
            f"{_speaker()}: unexpected {type(error).__name__}: {_one_sentence(error)} (--debug shows where)",
            file=sys.stderr,
        )
        return 1


def _one_sentence(error: Exception) -> str:
    words = [" ".join(part.split()) for part in (str(error), *getattr(error, "__notes__", ()))]
    return " ".join(part if len(part) <= 1000 else f"{part[:999]}…" for part in words)


def _rank() -> int:
    # as the launchers of several processes say it
    return int(os.environ.get("RANK", 0))


def _speaker() -> str:
    return f"grpo-lab, process {_rank()}" if "RANK" in os.environ else "grpo-lab"


def _say_warning(message, category, filename, lineno, file=None, line=None) -> None:
    from tqdm import tqdm

    alone = issubclass(category, RuntimeWarning)  # of what this process does: a reward that is slow on its completions
    if _rank() == 0 or alone:
        who = _speaker() if alone else "grpo-lab"
        tqdm.write(f"{who}: {' '.join(str(message).split())}", file=sys.stderr)  # above the bar, not into it


def _and_how_to_go_on(interrupt: KeyboardInterrupt) -> str:
    return f": {interrupt}. Go on with the same command and --resume" if str(interrupt) else ""


def make_parser() -> argparse.ArgumentParser:
    """The parser, its flags and help made from GRPOConfig."""
    parser = argparse.ArgumentParser(
        prog="grpo-lab", description="Group Relative Policy Optimization, to learn and to use."
    )
    parser.add_argument("--version", action="version", version=f"grpo-lab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train a causal language model with GRPO. With no flags at all: the embedded pocket model learns "
        "Countdown on a CPU within a minute.",
    )
    train.set_defaults(command=train_command)

    run = train.add_argument_group("the run")
    _add_model(run)
    run.add_argument(
        "--dataset",
        help="a .txt (one prompt a line), .jsonl, .csv or .parquet file, or a Hub id[:config], instead of the task's; "
        "without it and without a task, a few example prompts",
    )
    run.add_argument("--eval-dataset", help="the same, for evaluation before, after and, with --eval-steps, during")
    run.add_argument(
        "--prompt-column", metavar="NAME", help="the column with the prompts (default: prompt, or the task's)"
    )
    run.add_argument(
        "--answer-column", metavar="NAME", help="the column with the answers, which --reward compares with"
    )
    run.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")
    run.add_argument("--eval-split", default="test", help="the same for --eval-dataset (default: test)")
    run.add_argument("--max-train-samples", type=_positive, metavar="N", help="use only the first N prompts")
    run.add_argument(
        "--max-eval-samples",
        type=_positive,
        metavar="N",
        help="evaluate on only the first N (default: all, or the task's)",
    )
    run.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="ask the prompts as chats that begin with this (default: none, or the task's)",
    )
    run.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="countdown, exact_answer, numeric_answer, math_answer (LaTeX), marked_answer (the form #### answer), "
        "format:REGEX, or FILE.py:FUNCTION; may be given several times, and the first says what is right",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint in the output folder, or from this one",
    )
    run.add_argument("--force", action="store_true", help="train although the plan says that memory will not do")
    _add_settings(train.add_argument_group("settings", "defaults are those of GRPOConfig; a preset may change them"))

    planned = commands.add_parser(
        "plan",
        help="what memory and time a run would take",
        description="What memory and time a run would take, on this machine or a named one, before anything is loaded; "
        "where it does not fit, the nearest settings that do. Exit status 1 if it does not fit.",
    )
    planned.set_defaults(command=plan_command, dataset=None, reward=None)
    run = planned.add_argument_group("the run")
    _add_model(run)
    run.add_argument("--machine", metavar="NAME", help="T4, L4, A100-40, A100-80, H100, H200, laptop or binder; "
                     "without it, this machine, with what is free now")  # fmt: skip
    run.add_argument("--prompt-tokens", type=_positive, metavar="N", help="of the longest prompt (default: 128)")
    run.add_argument("--processes", type=_positive, default=1, metavar="N", help="of a launcher, each on a GPU "
                     "or all on the CPU: what one of them takes (default: 1)")  # fmt: skip
    _add_settings(planned.add_argument_group("settings", "as in train"))
    pretrain = commands.add_parser(
        "pretrain",
        help="make a small model from nothing, to be trained",
        description="Pre-train a character model on generated Countdown text, without any download. It can play and "
        "seldom does: grpo-lab train --preset countdown4 --model-name FOLDER brings it out.",
    )
    pretrain.set_defaults(command=pretrain_command)
    pretrain.add_argument("--output-dir", required=True, metavar="FOLDER", help="for the model and its card.json")
    pretrain.add_argument("--size", default="small", help="small (a minute on a CPU core), medium or large (for a GPU)")
    length = pretrain.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps of reading (default: those of the size)")
    length.add_argument("--seconds", type=float, help="read for so long instead")
    pretrain.add_argument("--seed", type=int, default=0, help="of weights and text (default: 0)")
    pretrain.add_argument("--device", default="auto", help="auto, cuda, cpu or mps (default: auto)")
    pretrain.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    pretrain.add_argument("--overwrite-output-dir", action="store_true", help="replace what an earlier pretrain wrote")
    pretrain.add_argument("--debug", action="store_true", help="show the traceback of an error")

    plot = commands.add_parser(
        "plot",
        help="draw several runs in one picture",
        description="Draw several runs in one picture. Folders side by side that differ in -seed0, -seed1, … are seeds "
        "of one run: their mean, and shaded the range from the lowest to the highest.",
    )
    plot.set_defaults(command=plot_command)
    plot.add_argument("runs", nargs="+", metavar="RUN", help="an output folder of train, or a recorded run")
    plot.add_argument("--output", default="comparison.png", metavar="FILE.png", help="default: comparison.png")
    plot.add_argument("--metrics", nargs="+", metavar="NAME", help="default: reward kl entropy completions/mean_length")
    plot.add_argument("--debug", action="store_true", help="show the traceback of an error")

    doctor = commands.add_parser(
        "doctor",
        help="look for what would stop or slow a run on this machine",
        description="Look for what would stop or slow a run on this machine: packages, device, memory, threads, disk, "
        "Hub, widgets, and whether the pocket model works. Exit status 1 if a run would stop.",
    )
    doctor.set_defaults(command=doctor_command)
    folder = GRPOConfig.output_dir
    doctor.add_argument("--output-dir", default=folder, help=f"the folder a run would write to (default: {folder})")
    doctor.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_model(group) -> None:
    group.add_argument(
        "--task",
        metavar="NAME",
        help="what is learned, with model, prompts, rewards and settings to start from: "
        f"{'; '.join(f'{name} ({task.source})' for name, task in TASKS.items())}; reasoning-gym:NAME (a task of that "
        "package, made without a network). "
        "Without --task, --dataset and --model-name: pocket. Every other flag wins",
    )
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="settings to start from, over those of the task; explicit flags win. "
        f"{' and '.join(TASKS)} are the tasks of these names, the others are variants of GRPO",
    )
    group.add_argument("--model-name", help="pocket (the embedded model), a Hub id or a folder (default: the task's)")
    group.add_argument(
        "--reward-model",
        help="a sequence-classification model with one output: a Hub id or a folder; "
        "without any reward, the policy itself judges, as a demonstration",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a Hub model")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_settings(group) -> None:
    docs, types = GRPOConfig.docs(), field_types()
    for field in fields(GRPOConfig):
        flags = [*ALIASES.get(field.name, []), "--" + field.name.replace("_", "-")]
        accepted, words = types[field.name]
        text = docs[field.name].replace("%", "%%")
        if field.default is not MISSING and not (
            field.default is None or field.default == () or field.default is False
        ):
            text += f" (default: {field.default})"
        keywords: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if bool in accepted:
            keywords["action"] = argparse.BooleanOptionalAction
        elif words:
            keywords["choices"] = words
        elif tuple in accepted:
            keywords |= {"nargs": "+", "type": float if field.name == "reward_weights" else str}
            keywords["metavar"] = "X"
        else:
            keywords |= {"type": accepted[0], "metavar": accepted[0].__name__.upper()}
        group.add_argument(*flags, **keywords)


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text[:40]!r}")
    return int(text)


def choose_task(options: argparse.Namespace) -> Task | None:
    """What is learned: --task, or a preset that is one, or the default run; None where the flags say it all."""
    if options.task:
        return find_task(options.task)
    if options.preset in TASKS:
        return TASKS[options.preset]
    return TASKS["pocket"] if options.model_name in (None, "pocket") and not options.dataset else None


def make_config(options: argparse.Namespace) -> tuple[GRPOConfig, str]:
    """The settings of a run, and in words where they come from: task, then preset, then explicit flags."""
    task = choose_task(options)
    names = [options.preset] if options.preset else []
    if task:
        names = [task.preset, *(name for name in names if name != task.preset)]
    elif options.model_name in (None, "pocket"):
        names = ["pocket", *names]
    start = {key: value for name in names for key, value in PRESETS[name].items()}
    own = task.rewards if task and not (options.reward or options.reward_model) else ()
    if len(start.get("reward_weights", ())) != len(own):
        start.pop("reward_weights", None)  # they are for the task's own rewards
    given = {f.name: getattr(options, f.name) for f in fields(GRPOConfig) if hasattr(options, f.name)}
    source = " + ".join(f"preset {name}" for name in names) or "the defaults of GRPOConfig"
    changes = ", ".join(f"{name}={value}" for name, value in given.items())
    return GRPOConfig(**{**start, **given}), f"{source}; changed: {changes or 'nothing'}"


def train_command(options: argparse.Namespace) -> int:
    """Load, show three completions and the accuracy, train, show them again."""
    _refuse_empty(options)
    config, source = make_config(options)  # before anything slow: a mistake in a flag is answered at once
    # Threads that wait must not spin: where another program wants a core, a spinning one keeps it from those that work
    # (measured on two cores, one of them wanted: 2 to 5 times slower). It is read when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from grpo_lab.hardware.devices import resolve_device, resolve_precision
    from grpo_lab.hardware.system import threads_for
    from grpo_lab.training.output_dir import refuse_results, refuse_unwritable

    resolve_precision(config.precision, resolve_device(config.device))  # this, too, before minutes of loading
    refuse_unwritable(Path(config.output_dir))
    if not options.resume and not config.overwrite_output_dir:
        refuse_results(Path(config.output_dir))
    trainer = make_trainer(options, config)
    torch.set_num_threads(threads_for(trainer.model))
    print(_headline(trainer, model_name(options)), f"Settings: {source}", _sizes(trainer), sep="\n")

    dataset = trainer.eval_dataset or trainer.train_dataset
    before = None if options.resume else _show(trainer, dataset, "Before")
    history = trainer.train(resume=options.resume)
    known = history[-1] if history and "eval/pass@1" in history[-1] else None  # of the same weights, and the same draws
    after = _show(trainer, dataset, "After", known)
    if before is not None and after is not None:
        print(f"\nRight answers, sampled: {before:.1%} before, {after:.1%} after.")
    print(f"Written to {config.output_dir}: final_model/, metrics.jsonl, completions.jsonl, training.png")
    return 0


def _refuse_empty(options: argparse.Namespace) -> None:
    if empty := [name for name, value in vars(options).items() if value == ""]:
        raise ValueError(f"--{empty[0].replace('_', '-')} is empty. Is a variable of the shell not set?")


def pretrain_command(options: argparse.Namespace) -> int:
    """Make a model, write it, and say what it can do."""
    _refuse_empty(options)
    folder = Path(options.output_dir)
    if folder.exists() and any(folder.iterdir()) and not options.overwrite_output_dir:
        raise ValueError(f"{folder} is not empty. Replace what it holds: --overwrite-output-dir. Or name another.")
    folder.mkdir(parents=True, exist_ok=True)  # where it cannot be, that is said now and not after minutes of reading
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train_command
    from grpo_lab.tasks.pretraining import pretrain, save

    settings = ("size", "steps", "seconds", "seed", "device", "precision")
    model, tokenizer, card = pretrain(**{name: getattr(options, name) for name in settings})
    save(folder, model, tokenizer, card)
    print(f"{card['task']}, right on problems kept for evaluation (sampled, greedily, at least one of 8):")
    for authors, shares in card["held_out"].items():
        print(f"  after {authors}: {', '.join(f'{share:.1%}' for share in shares.values())}")
    print(f"Written to {folder} after {card['seconds']:.0f} seconds. Go on:")
    print(f"  grpo-lab train --preset countdown4 --model-name {folder}")
    return 0


def plot_command(options: argparse.Namespace) -> int:
    """Draw the runs, and say in words what was drawn."""
    _refuse_empty(options)
    if "" in options.runs:
        raise ValueError("the name of a run is empty. Is a variable of the shell not set?")
    if Path(options.output).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output must end in .png, .svg or .pdf, got {options.output!r}.")
    from grpo_lab.course.comparison import DEFAULT_METRICS, comparison_figure, logged, read_runs, summary

    runs = read_runs(options.runs)
    there = logged(runs)
    metrics = list(dict.fromkeys(options.metrics or [name for name in DEFAULT_METRICS if name in there]))
    if not metrics:
        raise ValueError(f"none of {', '.join(DEFAULT_METRICS)} is in these runs. --metrics takes {', '.join(there)}.")
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


def doctor_command(options: argparse.Namespace) -> int:
    """Print one row for each thing looked at, below it the cure if it needs one; 1 if something would stop a run."""
    _refuse_empty(options)
    from grpo_lab.cli.doctor import examine

    problems = []
    for row in examine(Path(options.output_dir)):
        cure = f"\n{'':22} → {row.cure}" if row.cure else ""
        print(f"{row.state:8} {row.name:13} {row.words}{cure}", flush=True)
        problems += [row.name] if row.stops else []
    print(f"\nA run would stop: {', '.join(problems)}." if problems else "\nNothing here stops a run.")
    return 1 if problems else 0


def plan_command(options: argparse.Namespace) -> int:
    """Print the plan, and below it the nearest that fits if this one does not; 1 if it does not."""
    _refuse_empty(options)
    config, _ = make_config(options)
    from grpo_lab.planning.plan import what_fits

    found, models = _planned(options, config, options.prompt_tokens, options.processes, options.machine)
    print(found, flush=True)
    if not found.fits:
        print(what_fits(found, *models))
    return 0 if found.fits else 1


def _planned(options, config: GRPOConfig, prompt_tokens: int | None, processes: int, machine: str | None = None):
    """The plan, and the models that it is for, which have no weights yet."""
    import torch

    from grpo_lab.hardware.system import threads_for
    from grpo_lab.planning.plan import plan, without_weights

    names = [name for name in (model_name(options), options.reward_model) if name]
    for name in names:
        _check_folder(name)
    model, *judges = [
        without_weights(name, judges=name != model_name(options), trust_remote_code=options.trust_remote_code)
        for name in names
    ]
    torch.set_num_threads(threads_for(model))
    how = {"machine": machine, "prompt_tokens": prompt_tokens, "processes": processes, "name": model_name(options)}
    return plan(config, model, reward_model=judges, **how), (model, judges)


def _plan_or_stop(options: argparse.Namespace, config: GRPOConfig, tokenizer, dataset) -> None:
    """Say what the run will take, before its weights are loaded. Raises MemoryError if that is not there."""
    from grpo_lab.planning.plan import what_fits
    from grpo_lab.rollout.prompts import encode_prompt, longest_prompts

    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in longest_prompts(dataset))
    try:
        found, models = _planned(options, config, longest, int(os.environ.get("WORLD_SIZE", 1)))
    except Exception as error:  # a plan is a help; what is wrong with the run, the run itself will say
        print(f"Plan: none could be made ({type(error).__name__}: {_one_sentence(error)[:200]})")
        return
    print(f"Plan: it {found.verdict}", flush=True)
    if not found.fits and not options.force:
        raise MemoryError(f"the run {found.verdict}. {what_fits(found, *models)} --force trains all the same.")


def make_trainer(options: argparse.Namespace, config: GRPOConfig):
    """The trainer that the flags ask for. Raises ValueError or OSError for a model or dataset that is not there."""
    from grpo_lab import pocket
    from grpo_lab.training.trainer import GRPOTrainer

    task = choose_task(options)
    rewards = _rewards(options, task)
    train, held_out = _data(options, task, rewards, config.seed)
    name = model_name(options)
    tokenizer = _tokenizer(pocket.WEIGHTS if name == "pocket" else name, options.trust_remote_code)
    _plan_or_stop(options, config, tokenizer, train)
    model = pocket.load()[0] if name == "pocket" else _load(name, options.trust_remote_code)
    return GRPOTrainer(model, None, rewards or model, tokenizer, config, train, held_out)


def model_name(options: argparse.Namespace) -> str:
    """The model to start from."""
    task = choose_task(options)
    if not options.model_name and task and task.model_name is None:
        raise ValueError(
            f"the task {task.preset} wants a model that has read about it: grpo-lab pretrain --output-dir FOLDER, "
            "and then --model-name FOLDER."
        )
    return options.model_name or (task.model_name if task else "pocket")


def _data(options: argparse.Namespace, task: Task | None, rewards: list, seed: int) -> tuple[Any, Any]:
    """The prompts to train on and to evaluate on: the task's, or in their place what flags name; None for none."""
    from grpo_lab.rewards.verifiable import exact_answer, math_answer, numeric_answer
    from grpo_lab.rollout.prompts import SimplePromptDataset, as_chats
    from grpo_lab.tasks.files import EXAMPLE_PROMPTS, load_prompts

    prompt_column = options.prompt_column or (task.prompt_column if task else "prompt")
    compares = any(f in rewards for f in (numeric_answer, exact_answer, math_answer))
    answer_column = options.answer_column or ("answer" if compares else None)

    def read(name: str, split: str):
        rows = load_prompts(name, prompt_column=prompt_column, answer_column=answer_column, split=split)
        if numeric_answer in rewards:
            check_numbers(rows, name)
        return as_chats(rows, task.system_prompt) if task and task.system_prompt else rows

    train = held_out = None
    if options.dataset:
        train = read(options.dataset, options.split)
    elif task:
        train, held_out = task.data(seed)
    else:
        train = SimplePromptDataset(EXAMPLE_PROMPTS)
        print("No --dataset: using a few example prompts.")
    if options.eval_dataset:
        held_out = read(options.eval_dataset, options.eval_split)
    limits = options.max_train_samples, options.max_eval_samples or (task and task.max_eval_samples)
    some = [
        rows.select(range(min(limit, len(rows)))) if rows and limit else rows
        for rows, limit in zip((train, held_out), limits, strict=True)
    ]
    return tuple(as_chats(rows, options.system_prompt) if rows and options.system_prompt else rows for rows in some)


def _tokenizer(name: str | Path, trust_remote_code: bool):
    from transformers import AutoTokenizer

    _check_folder(str(name))
    with _loading(str(name)):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def _load(name: str, trust_remote_code: bool):
    from transformers import AutoModelForCausalLM

    return _load_whole(AutoModelForCausalLM, name, trust_remote_code=trust_remote_code)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"could not load the model {name} ({type(error).__name__}: {first_line[:200]}). "
            "Is it complete? Without a network, give a folder that holds it."
        ) from error


def _load_whole(kind, name: str, **settings):
    """A model with all its weights: transformers would fill in missing ones with random numbers."""
    with _loading(name):
        model, report = kind.from_pretrained(name, output_loading_info=True, **settings)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} has no weights for {', '.join(missing[:3])}: it is not a model of this kind.")
    return model


def _check_folder(name: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local and not Path(name).is_dir():
        raise ValueError(
            f"there is no folder {name}. A model is a folder, a Hub id such as Qwen/Qwen2.5-0.5B, or pocket."
        )


def _rewards(options: argparse.Namespace, task: Task | None) -> list:
    """The judges: those that flags name, else the task's; none where the policy is to judge itself."""
    judges = [named_reward(name) for name in options.reward or ()]
    if options.reward_model:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        from grpo_lab.rewards.reward_models import SequenceClassifierReward

        _check_folder(options.reward_model)
        tokenizer = AutoTokenizer.from_pretrained(options.reward_model)
        labels = AutoConfig.from_pretrained(options.reward_model).num_labels
        if labels != 1:
            raise ValueError(f"a reward model needs one output, {options.reward_model} has {labels}.")
        judge = _load_whole(AutoModelForSequenceClassification, options.reward_model)
        judges.append(SequenceClassifierReward(judge, tokenizer))
    if options.answer_column and not judges and not task:
        raise ValueError(
            "--answer-column needs a reward that compares with the answers: --reward numeric_answer (the number that a "
            "text ends with), math_answer (LaTeX), exact_answer (the same text) or FILE.py:FUNCTION."
        )
    return judges or list(task.rewards if task else ())


def named_reward(name: str):
    """A built-in reward by name, `format:REGEX`, or a function of your own: `FILE.py:FUNCTION`."""
    from grpo_lab.rewards.verifiable import BUILT_IN, matches_format

    kind, _, rest = name.partition(":")
    if name in BUILT_IN:
        if name == "math_answer":
            require_package("math_verify")  # now, not at the first answer
        return BUILT_IN[name]
    if kind == "format" and rest:
        return matches_format(rest)
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"there is no reward {name!r}. Use {', '.join(BUILT_IN)}, format:REGEX or FILE.py:FUNCTION.")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file} to take the reward {function!r} from.")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports from beside itself
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # its own, SystemExit, whatever it may raise
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}.")
    return getattr(module, function)


def _headline(trainer, name: str) -> str:
    import torch

    parameters = sum(p.numel() for p in trainer.model.parameters())
    cores = torch.get_num_threads()
    where = f"{trainer.device.type}, {trainer.precision}"
    where += f", {cores} thread{'s' if cores > 1 else ''}" if trainer.device.type == "cpu" else ""
    where += f" · {trainer.processes.world_size} processes" if trainer.processes.world_size > 1 else ""
    return f"GRPO on {name} ({parameters / 1e6:.2f} M parameters) · {where}"


def _sizes(trainer) -> str:
    config = trainer.config
    prompts = min(config.prompts_per_step, len(trainer.train_dataset))
    return (
        f"{len(trainer.train_dataset)} prompts · {trainer.total_steps} optimizer steps of "
        f"{prompts} prompts × {config.num_generations_per_prompt} completions "
        f"= {prompts * config.num_generations_per_prompt}"
    )


def _show(trainer, dataset, when: str, scores: dict[str, float] | None = None) -> float | None:
    """Print three completions and, where there are answers to check, the accuracy, if it is not known; returns that."""
    from grpo_lab.training.evaluation import evaluation_lines

    print(f"\n{when} training")
    for example in trainer.examples(dataset, 3):
        prompt = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
        print(f"  {_short(prompt)} → {_short(example['completion'])}   (reward {example['reward']:.2f})")
    if trainer.eval_dataset is None:
        return None
    scores = scores or trainer.evaluate()
    print(f"  mean reward: {scores['eval/reward']:.3f}")
    print("  " + "\n  ".join(evaluation_lines(scores, trainer.config.num_generations_per_prompt)))
    print(f"  on {len(dataset)} prompts kept for evaluation", flush=True)
    return scores["eval/pass@1"]


def _short(text: str, limit: int = 70) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
