"""Tasks of the package reasoning-gym."""

from difflib import get_close_matches
from functools import partial

from grpo_lab.rewards.isolated import checksum, gym_score, require_package
from grpo_lab.tasks.task import QWEN, Task

GYM = "reasoning-gym:"
GYM_PROMPTS, GYM_HELD_OUT = 1000, 256  # generating one takes up to 20 ms where SymPy is used
GYM_SYSTEM_PROMPT = "Think step by step. Then write #### and after it the answer alone, as the problem asks for it."


def gym_problems(name: str, seed: int = 0):
    """Generate training and held-out problems of a reasoning-gym task from the seed; no network needed.

    Held-out problems that also occur in training, as happens in small tasks, are left out. The column "answer" holds
    one right answer; a problem often has others.
    Source: Stojanovski et al., *Reasoning Gym* (arXiv 2505.24760).
    """
    import reasoning_gym

    from grpo_lab.rollout.prompts import SimplePromptDataset, as_chats

    def rows(size: int, draw: int) -> dict[str, list]:
        # problem i is drawn from seed + i, so the two ranges of seeds must not overlap
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
    """Return a reasoning-gym task. Raises ValueError if the package is missing or has no task of this name."""
    require_package("reasoning_gym")
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
