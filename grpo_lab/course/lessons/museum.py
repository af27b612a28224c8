"""The bug museum: twelve runs with one wrong line each, their metrics, and the judge of the learner's diagnosis."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

from grpo_lab import GRPOConfig, GRPOTrainer, StepRecord, pocket
from grpo_lab.course.checks import Verdict
from grpo_lab.course.lessons.museum_bugs import BUGS, EXHIBITS, patched
from grpo_lab.course.recorded import RecordedRun, recorded_runs
from grpo_lab.rewards import verifiable as rewards
from grpo_lab.tasks.countdown import countdown_dataset

HEALTHY, SEED = "healthy", 0
SETTINGS = {"num_iterations": 4, "max_steps": 60, "learning_rate": 1e-3, "kl_coef": 0.2, "top_p": 0.95}
"""What differs from the pocket preset: several updates per rollout, so that clipping acts, and a truncated sampler."""
DROPOUT = 0.1
SHOWN_STEPS = (1, 29, 57)
KEPT = ("step", "reward", "frac_reward_zero_std", "loss", "kl", "entropy", "grad_norm", "clip_ratio/region_mean",
        "completions/mean_length", "sampling/sampling_logp_difference/max")  # fmt: skip
DIFFERENCE = "sampling/sampling_logp_difference/max"
SUSPECTS = {number: bug.name for number, bug in enumerate(BUGS.values(), 1)}


def run(exhibit: str, *, steps: int | None = None, **changes) -> tuple[GRPOTrainer, list[StepRecord]]:
    """Train the pocket model with the exhibit's bug in the package, or without a bug ("healthy")."""
    model, tokenizer = pocket.load()
    for module in model.modules():  # many models have dropout, which the trainer must switch off
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = DROPOUT
    folder = tempfile.mkdtemp()
    settings = SETTINGS | changes
    config = GRPOConfig.preset("pocket", seed=SEED, output_dir=folder, overwrite_output_dir=True, **settings)
    with nullcontext() if exhibit == HEALTHY else patched(BUGS[EXHIBITS[exhibit]]):
        trainer = GRPOTrainer(model, None, rewards.countdown, tokenizer, config, countdown_dataset(pocket.NUM_PROMPTS))
        records = []
        for record in trainer.steps():
            records.append(record)
            if record.step == steps:
                break
    return trainer, records


@cache
def recorded(exhibit: str) -> RecordedRun:
    """Return the exhibit's run as benchmarks/museum.py recorded it."""
    return recorded_runs(f"museum/{exhibit}")[0]


def first_numbers(exhibit: str) -> dict[str, float]:
    """Return metrics of the first rollout, at its first update (@1) and at its last."""
    rows = recorded(exhibit).metrics[: SETTINGS["num_iterations"]]
    return {
        "|Δlog p|": rows[0][DIFFERENCE],
        "KL@1": rows[0]["kl"],
        "length": rows[0]["completions/mean_length"],
        "entropy": rows[0]["entropy"],
        f"clipped@{len(rows)}": rows[-1]["clip_ratio/region_mean"],
        f"KL@{len(rows)}": rows[-1]["kl"],
    }


def judge(exhibit: str, answer) -> Verdict:
    """Return the verdict on an answer: a number from SUSPECTS; `...` or None means no answer yet. Never raises."""
    title = f"exhibit {exhibit}"
    if answer is ... or answer is None:
        return Verdict(title, "to do", "no diagnosis yet.")
    suspect = next((bug for bug in BUGS.values() if bug.name == SUSPECTS.get(answer)), None)
    if suspect is None:
        return Verdict(title, "not yet", f"there is no suspect {answer!r}.", f"name one of {list(SUSPECTS)}")
    if suspect is not BUGS[EXHIBITS[exhibit]]:
        return Verdict(title, "not yet", "no. What would you expect to see if it were that?", suspect.expect)
    lines = {f"right, in {suspect.function}": suspect.right, "the line of this exhibit": suspect.wrong}
    return Verdict(title, "ok", f"yes, {suspect.name}. Here is the line.", suspect.cure, {}, lines)


@dataclass(frozen=True, repr=False)
class Hearing:
    """The verdicts on a whole diagnosis: one per exhibit, and how many are right."""

    verdicts: dict[str, Verdict]

    @property
    def answered(self) -> list[Verdict]:
        """Return the verdicts that are not "to do"."""
        return [verdict for verdict in self.verdicts.values() if verdict.state != "to do"]

    @property
    def sum(self) -> str:
        """Return how many are right, in words."""
        return f"{sum(map(bool, self.verdicts.values()))} of {len(self.verdicts)} named"

    def __bool__(self) -> bool:
        return all(self.verdicts.values())

    def __repr__(self) -> str:
        return "\n".join([*map(repr, self.answered or [_NOTHING]), self.sum])

    def _repr_html_(self) -> str:
        return "".join(verdict._repr_html_() for verdict in self.answered or [_NOTHING]) + f"<p>{self.sum}</p>"


_NOTHING = Verdict("exhibits", "to do", "no diagnosis yet.")


def hear(diagnosis: Mapping[str, Any]) -> Hearing:
    """Judge each letter of EXHIBITS; a missing letter is "to do"."""
    return Hearing({exhibit: judge(exhibit, diagnosis.get(exhibit)) for exhibit in EXHIBITS})


def late(rows: Sequence[dict], name: str) -> float:
    """Return the mean over the updates of the last three rollouts."""
    values = [row[name] for row in rows[-3 * SETTINGS["num_iterations"] :]]
    return sum(values) / len(values)
