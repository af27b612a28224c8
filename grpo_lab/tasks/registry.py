"""The tasks that `--task` knows.

Each task has its own settings in `training.presets.PRESETS`, so `--preset gsm8k` and `--task gsm8k` are the same
run. With both flags, as in `--task gsm8k --preset dr_grpo`, the preset's settings override those of the task.
"""

from grpo_lab.rewards.verifiable import countdown, marked_answer, numeric_answer
from grpo_lab.tasks.countdown import countdown_with_four, pocket_countdown
from grpo_lab.tasks.gsm8k import MARK_THE_ANSWER, gsm8k
from grpo_lab.tasks.gym import GYM, gym_task
from grpo_lab.tasks.task import QWEN, Task

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


def find_task(name: str) -> Task:
    """Return the task of this name. Raises ValueError that lists the tasks."""
    if name in TASKS:
        return TASKS[name]
    if name.startswith(GYM):
        return gym_task(name.removeprefix(GYM))
    raise ValueError(f"there is no task {name[:80]!r}. Tasks: {', '.join(TASKS)}, {GYM}NAME.")
