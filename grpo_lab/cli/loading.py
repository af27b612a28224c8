"""Load what a run needs from the names that a user types: task, model, tokenizer, dataset and rewards."""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_lab.rewards.isolated import require_package
from grpo_lab.tasks.gsm8k import check_numbers
from grpo_lab.tasks.registry import TASKS, find_task
from grpo_lab.tasks.task import Task


def choose_task(
    name: str | None = None, *, preset: str | None = None, model_name: str | None = None, dataset: str | None = None
) -> Task | None:
    """Return the task called `name`, else the one called `preset`, else pocket; None if a model or dataset is given.

    Raises: ValueError if there is no task called `name`.
    """
    if name:
        return find_task(name)
    if preset in TASKS:
        return TASKS[preset]
    return TASKS["pocket"] if model_name in (None, "pocket") and not dataset else None


def choose_model(name: str | None, task: Task | None) -> str:
    """Return the name of the model to train: `name`, else the task's model, else pocket.

    Raises: ValueError if the task has no model of its own.
    """
    if not name and task and task.model_name is None:
        raise ValueError(
            f"the task {task.preset} needs a pre-trained model: run grpo-lab pretrain --output-dir FOLDER, "
            "then add --model-name FOLDER."
        )
    return name or (task.model_name if task else "pocket")


def check_folder(name: str) -> None:
    """Raise ValueError if the name looks like a folder and there is none."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local and not Path(name).is_dir():
        raise ValueError(
            f"there is no folder {name}. A model is a folder, a Hub id such as Qwen/Qwen2.5-0.5B, or pocket."
        )


def load_tokenizer(name: str, *, trust_remote_code: bool = False):
    """Load the tokenizer of a model: pocket, a folder or a Hub id. Raises ValueError if it cannot be loaded."""
    from transformers import AutoTokenizer

    from grpo_lab import pocket

    check_folder(name)
    with _naming_the_model(name):
        return AutoTokenizer.from_pretrained(
            pocket.WEIGHTS if name == "pocket" else name, trust_remote_code=trust_remote_code
        )


def load_model(name: str, *, trust_remote_code: bool = False):
    """Load a causal language model: pocket, a folder or a Hub id. Raises ValueError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    from grpo_lab import pocket

    if name == "pocket":
        return pocket.load()[0]
    return _load_all_weights(AutoModelForCausalLM, name, trust_remote_code=trust_remote_code)


def load_reward_model(name: str):
    """Load a sequence-classification model with one output as a reward. Raises ValueError if it cannot be one."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from grpo_lab.rewards.reward_models import SequenceClassifierReward

    check_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    labels = AutoConfig.from_pretrained(name).num_labels
    if labels != 1:
        raise ValueError(f"a reward model needs one output, {name} has {labels}.")
    return SequenceClassifierReward(_load_all_weights(AutoModelForSequenceClassification, name), tokenizer)


def _load_all_weights(auto_class, name: str, **settings):
    # transformers would fill in missing weights with random numbers
    with _naming_the_model(name):
        model, report = auto_class.from_pretrained(name, output_loading_info=True, **settings)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} has no weights for {', '.join(missing[:3])}: it is not a model of this kind.")
    return model


@contextmanager
def _naming_the_model(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"could not load the model {name} ({type(error).__name__}: {first_line[:200]}). "
            "Is it complete? Without a network, give a folder that holds it."
        ) from error


def load_reward(name: str):
    """Return a built-in reward by name, `format:REGEX`, or a function of your own, `FILE.py:FUNCTION`.

    Raises: ValueError if there is no such reward, or the file cannot be imported.
    """
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
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up here
    sys.path.append(str(Path(file).resolve().parent))  # it may import files beside itself
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file may raise anything, SystemExit included
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}.")
    return getattr(module, function)


def load_data(
    task: Task | None,
    rewards: Sequence,
    seed: int,
    *,
    dataset: str | None = None,
    eval_dataset: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    split: str = "train",
    eval_split: str = "test",
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    system_prompt: str | None = None,
) -> tuple[Any, Any]:
    """Return the prompts to train on, and those to evaluate on or None.

    Without `dataset` and `eval_dataset` they are the task's, and without a task a few example prompts.

    Args:
        rewards: if one of them compares with answers, a dataset needs a column of answers.
        seed: of the task's own prompts.
        prompt_column, answer_column, split, eval_split: as in `load_prompts`; None: the task's columns.
        max_train_samples, max_eval_samples: take only so many, from the start; None: all, or the task's number.
        system_prompt: turn the prompts into chats that begin with it; None: the task's.
    Raises: ValueError if a dataset cannot be read.
    """
    from grpo_lab.rewards.verifiable import exact_answer, math_answer, numeric_answer
    from grpo_lab.rollout.prompts import SimplePromptDataset, as_chats
    from grpo_lab.tasks.files import EXAMPLE_PROMPTS, load_prompts

    prompt_column = prompt_column or (task.prompt_column if task else "prompt")
    compares = any(f in rewards for f in (numeric_answer, exact_answer, math_answer))
    answer_column = answer_column or ("answer" if compares else None)

    def read(name: str, split: str):
        rows = load_prompts(name, prompt_column=prompt_column, answer_column=answer_column, split=split)
        if numeric_answer in rewards:
            check_numbers(rows, name)
        return as_chats(rows, task.system_prompt) if task and task.system_prompt else rows

    def finish(rows, limit: int | None):
        rows = rows.select(range(min(limit, len(rows)))) if rows and limit else rows
        return as_chats(rows, system_prompt) if rows and system_prompt else rows

    held_out = None
    if dataset:
        train = read(dataset, split)
    elif task:
        train, held_out = task.data(seed)
    else:
        train = SimplePromptDataset(EXAMPLE_PROMPTS)
    if eval_dataset:
        held_out = read(eval_dataset, eval_split)
    return finish(train, max_train_samples), finish(held_out, max_eval_samples or (task and task.max_eval_samples))
