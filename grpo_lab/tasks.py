"""What a run is about: a model to start from, problems with answers, some of them held out, and what is right.

Each task has settings of its own in `config.PRESETS`, so `--preset gsm8k` and `--task gsm8k` are the same run; with
both flags the task says what is learned and the preset how: `--task gsm8k --preset dr_grpo`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from grpo_lab.rewards import RewardFunction, countdown, final_number, marked_answer, numeric_answer


@dataclass(frozen=True)
class Task:
    """A task; whatever a flag says takes the place of what stands here."""

    source: str
    """One line: what it is, and where it comes from."""
    model_name: str
    """The model to start from: pocket, a Hub id or a folder."""
    data: Callable[[int], tuple[Any, Any]]
    """seed -> the prompts to train on, and those kept for evaluation, in an order drawn by the seed."""
    rewards: tuple[RewardFunction, ...]
    """The first says what is right, and pass@k counts by it."""
    preset: str
    """The settings to start from, in config.PRESETS."""
    max_eval_samples: int | None = None
    """Held-out prompts that are used if no flag says how many; all if None."""
    prompt_column: str = "prompt"
    """Where the prompts are in a file that replaces its data; the answers are in "answer"."""
    system_prompt: str | None = None
    """What makes chats of them; None leaves them texts."""


def pocket_countdown(seed: int = 0):
    """Countdown for the pocket model: 2048 prompts, and 400 whose problems never occur in training."""
    from grpo_lab import pocket
    from grpo_lab.data import countdown_dataset

    return countdown_dataset(pocket.NUM_PROMPTS, seed=seed), countdown_dataset(400, split="held-out", seed=seed)


MARK_THE_ANSWER = """\
Think step by step. Then finish with a line that holds only #### and the answer, a single number, like this:
#### 42"""


def gsm8k(seed: int = 0):
    """GSM8K from the Hub: its 7,473 training problems, and its 1,319 test problems in an order drawn by the seed.

    Prompts are chats that ask for the form in which GSM8K's own answers end, `#### 42`.
    Source: Cobbe et al., *Training Verifiers to Solve Math Word Problems* (arXiv 2110.14168).
    """
    from grpo_lab.data import as_chats, load_prompts

    def split(name: str):
        rows = load_prompts("openai/gsm8k:main", prompt_column="question", answer_column="answer", split=name)
        check_numbers(rows, f"GSM8K's split {name!r}")
        return as_chats(rows, MARK_THE_ANSWER)

    held_out = split("test")
    return split("train"), held_out.select(Random(f"{seed}/gsm8k").sample(range(len(held_out)), len(held_out)))


def check_numbers(dataset, name: str) -> None:
    """Raises ValueError that names the first answer without a number: now, not when its turn comes."""
    for i in range(len(dataset)):
        if final_number(str(dataset[i]["answer"])) is None:
            raise ValueError(
                f"{name}: answer {i} has no number: {str(dataset[i]['answer'])[:60]!r}. For texts there is "
                "--reward exact_answer, for LaTeX math_answer."
            )


QWEN = "Qwen/Qwen2.5-0.5B-Instruct"  # with AdamW and a reference 10 GB before activations; of 1.5B it would be 31

TASKS: dict[str, Task] = {
    "pocket": Task(
        source="Countdown, three numbers and a target; the embedded model and its default run",
        model_name="pocket",
        data=pocket_countdown,
        rewards=(countdown,),
        preset="pocket",
    ),
    "gsm8k": Task(
        source="grade-school word problems: openai/gsm8k, Cobbe et al. (arXiv 2110.14168)",
        model_name=QWEN,
        data=gsm8k,
        rewards=(numeric_answer, marked_answer),
        preset="gsm8k",
        max_eval_samples=256,
        prompt_column="question",
        system_prompt=MARK_THE_ANSWER,
    ),
}


def find_task(name: str) -> Task:
    """The task of this name. Raises ValueError that lists those there are."""
    if name in TASKS:
        return TASKS[name]
    raise ValueError(f"there is no task {name[:80]!r}. Tasks: {', '.join(TASKS)}.")
