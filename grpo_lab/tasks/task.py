"""The fields of a task: a model to start from, training and held-out prompts, and reward functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_lab.rewards.verifiable import RewardFunction


@dataclass(frozen=True)
class Task:
    """A task of `grpo-lab train`; flags override its fields."""

    source: str
    """One line for --help: what the task is and where it comes from."""
    model_name: str | None
    """Model to start from: pocket, a Hub id or a folder; None if --model-name must name a pre-trained one."""
    data: Callable[[int], tuple[Any, Any]]
    """seed -> the training prompts and the held-out prompts."""
    rewards: tuple[RewardFunction, ...]
    """Reward functions; the first decides what counts as right, also for pass@k."""
    preset: str
    """Name of its settings in training.presets.PRESETS."""
    max_eval_samples: int | None = None
    """Default number of held-out prompts to evaluate on; None: all."""
    prompt_column: str = "prompt"
    """Column with the prompts in a file that replaces its data; the answers are in "answer"."""
    system_prompt: str | None = None
    """System prompt that turns the prompts into chats; None: they stay texts."""


QWEN = "Qwen/Qwen2.5-0.5B-Instruct"  # AdamW and a reference take 10 GB before activations; 1.5B would take 31
