"""What a task is: a model to start from, problems with answers, some of them held out, and what is right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_lab.rewards.verifiable import RewardFunction


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


QWEN = "Qwen/Qwen2.5-0.5B-Instruct"  # with AdamW and a reference 10 GB before activations; of 1.5B it would be 31
