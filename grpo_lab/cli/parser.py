"""The flags that `train` and `plan` share: one for each field of GRPOConfig, with the field's docstring as help.

Every import of PyTorch in this room stands inside a function, so that `--help` answers at once.
"""

import argparse
from dataclasses import MISSING, fields
from typing import Any

from grpo_lab.cli.loading import choose_task
from grpo_lab.tasks.registry import TASKS
from grpo_lab.tasks.task import Task
from grpo_lab.training.config import PRESETS, GRPOConfig, field_types

ALIASES = {"num_generations_per_prompt": ["--num-generations"]}  # --help shows the first flag


def add_model_flags(group) -> None:
    """Add the flags that name the task, the preset and the models."""
    tasks = "; ".join(f"{name} ({task.source})" for name, task in TASKS.items())
    group.add_argument(
        "--task",
        metavar="NAME",
        help="what to learn: sets the model, prompts, rewards and settings, unless another flag sets them. "
        f"{tasks}; reasoning-gym:NAME (a task of that package, generated offline). "
        "Default: pocket, if --dataset and --model-name are not given",
    )
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="settings that replace the task's; explicit flags win. "
        f"{', '.join(TASKS)} are the tasks of the same name, the others are variants of GRPO",
    )
    group.add_argument(
        "--model-name", help="pocket (the embedded model), a Hub id or a folder (default: the task's model)"
    )
    group.add_argument(
        "--reward-model",
        help="a sequence-classification model with one output: a Hub id or a folder. "
        "Without any reward, the trained model scores its own completions (a demonstration only)",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="allow a Hub model to run its own code")


def add_config_flags(group) -> None:
    """Add a flag for each field of GRPOConfig; a flag that is not given leaves no attribute in the namespace."""
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


def positive_int(text: str) -> int:
    """Return the text as an integer of at least 1, or raise the error that argparse shows."""
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text[:40]!r}")
    return int(text)


def task_from(options: argparse.Namespace) -> Task | None:
    """Return the task that the flags choose."""
    return choose_task(options.task, preset=options.preset, model_name=options.model_name, dataset=options.dataset)


def config_from(options: argparse.Namespace) -> tuple[GRPOConfig, str]:
    """Return the settings, and in words where they come from: the task, then the preset, then explicit flags."""
    task = task_from(options)
    names = [options.preset] if options.preset else []
    if task:
        names = [task.preset, *(name for name in names if name != task.preset)]
    elif options.model_name in (None, "pocket"):
        names = ["pocket", *names]
    start = {key: value for name in names for key, value in PRESETS[name].items()}
    own_rewards = task.rewards if task and not (options.reward or options.reward_model) else ()
    if len(start.get("reward_weights", ())) != len(own_rewards):
        start.pop("reward_weights", None)  # a preset's weights are for the rewards of its own task
    given = {f.name: getattr(options, f.name) for f in fields(GRPOConfig) if hasattr(options, f.name)}
    source = " + ".join(f"preset {name}" for name in names) or "the defaults of GRPOConfig"
    changes = ", ".join(f"{name}={value}" for name, value in given.items())
    return GRPOConfig(**{**start, **given}), f"{source}; changed: {changes or 'nothing'}"
