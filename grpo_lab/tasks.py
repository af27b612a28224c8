"""What a run is about: a model to start from, problems with answers, some of them held out, and what is right.

Each task has settings of its own in `config.PRESETS`, so `--preset gsm8k` and `--task gsm8k` are the same run; with
both flags the task says what is learned and the preset how: `--task gsm8k --preset dr_grpo`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from random import Random
from typing import Any

from grpo_lab.apart import checksum, gym_score, need
from grpo_lab.rewards import RewardFunction, countdown, final_number, marked_answer, numeric_answer


@dataclass(frozen=True)
class Task:
    """A task; whatever a flag says takes the place of what stands here."""

    source: str
    """One line: what it is, and where it comes from."""
    model_name: str | None
    """The model to start from: pocket, a Hub id or a folder; None: one that `grpo-lab pretrain` made, to be named."""
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


def countdown_with_four(seed: int = 0):
    """Countdown with four numbers: 8192 prompts, and 400 whose problems occur in no training, nor in pre-training."""
    from grpo_lab.data import countdown_dataset

    return countdown_dataset(8192, numbers=4, seed=seed), countdown_dataset(400, numbers=4, split="held-out", seed=seed)


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
        answer = str(dataset[i]["answer"])
        if final_number(answer) is None:
            raise ValueError(
                f"{name}: answer {i} has no number: {answer[:60]!r}. For texts there is "
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
    "countdown4": Task(
        source="Countdown, four numbers and a target; for a model that grpo-lab pretrain made",
        model_name=None,
        data=countdown_with_four,
        rewards=(countdown,),
        preset="countdown4",
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


GYM = "reasoning-gym:"
GYM_PROMPTS, GYM_HELD_OUT = 1000, 256  # making one takes up to 20 ms, where SymPy has a part in it
GYM_SYSTEM_PROMPT = "Think step by step. Then write #### and after it the answer alone, as the problem asks for it."


def gym_problems(name: str, seed: int = 0):
    """Problems of reasoning-gym's task of this name, made here from the seed: no network is needed.

    A held-out problem that occurs in training, which in small tasks happens, is left out. Its column "answer" is one
    answer; often there are others that are as right.
    Source: Stojanovski et al., *Reasoning Gym* (arXiv 2505.24760).
    """
    import reasoning_gym

    from grpo_lab.data import SimplePromptDataset, as_chats

    def rows(size: int, draw: int) -> dict[str, list]:
        # a problem is drawn from (seed + its number): the two sets must lie further apart than they are long
        start = (2 * seed + draw) * max(GYM_PROMPTS, GYM_HELD_OUT)
        problems = list(reasoning_gym.create_dataset(name, seed=start, size=size))
        return {
            "prompts": [p["question"] for p in problems],
            "answer": [str(p["answer"]) for p in problems],
            "problem": [[start, i, size, checksum(p["question"])] for i, p in enumerate(problems)],
        }

    train, held_out = rows(GYM_PROMPTS, 0), rows(GYM_HELD_OUT, 1)
    seen = set(train["prompts"])
    new = [i for i, prompt in enumerate(held_out["prompts"]) if prompt not in seen]
    if not new:
        raise ValueError(f"reasoning-gym's {name} has too few problems: all held-out ones occur in training too.")
    sets = SimplePromptDataset(**train), SimplePromptDataset(**held_out).select(new)
    return tuple(as_chats(rows, GYM_SYSTEM_PROMPT) for rows in sets)


def gym_task(name: str) -> Task:
    """A task of the package reasoning-gym. Raises ValueError if the package is not there or has none of this name."""
    need("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        like = get_close_matches(name, DATASETS, n=5) or sorted(DATASETS)
        raise ValueError(f"reasoning-gym has no task {name[:80]!r}. Did you mean {', '.join(like)}?")
    return Task(
        source=f"{name} of reasoning-gym, Stojanovski et al. (arXiv 2505.24760)",
        model_name=QWEN,
        data=partial(gym_problems, name),
        rewards=(gym_score(name),),
        preset="gsm8k",
        system_prompt=GYM_SYSTEM_PROMPT,
    )


def find_task(name: str) -> Task:
    """The task of this name. Raises ValueError that lists those there are."""
    if name in TASKS:
        return TASKS[name]
    if name.startswith(GYM):
        return gym_task(name.removeprefix(GYM))
    raise ValueError(f"there is no task {name[:80]!r}. Tasks: {', '.join(TASKS)}, {GYM}NAME.")
