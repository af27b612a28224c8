"""Record the exhibits of the bug museum (notebook 10): the healthy run, and one with each of twelve wrong lines.

    python benchmarks/museum.py            all that are not recorded yet
    python benchmarks/museum.py A healthy  these, anew

Each is a folder in runs/museum/, named by its letter and not by its bug: run.json (settings, versions, device, date,
accuracy on held-out problems before and after, judged by the right reward), metrics.jsonl with every step, and two
groups of completions from the first rollout, one in the middle and the last in completions.jsonl.
"""

import argparse
import json
import time
import warnings

import torch
from record import RUNS as RECORDED
from record import circumstances

from grpo_lab import GRPOTrainer
from grpo_lab.course.lessons import museum
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.training.metrics import JsonLines

RUNS = RECORDED / "museum"
HELD_OUT = 200


def record(exhibit: str) -> dict:
    """Make one run and write its folder; returns what run.json holds."""
    held_out = countdown_dataset(HELD_OUT, split="held-out", seed=museum.SEED)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the package says of some of them is for the learner to find out
        trainer, records = museum.run(exhibit)
    seconds = time.perf_counter() - began
    # with a KL the judge would need a reference, which it does not use
    settings = trainer.config.replace(kl_coef=0.0)
    after = GRPOTrainer(trainer.model, None, countdown, trainer.tokenizer, settings, held_out).evaluate(held_out)
    target = RUNS / f"{exhibit}-seed{museum.SEED}"
    target.mkdir(parents=True, exist_ok=True)
    for file in target.iterdir():
        file.unlink()
    JsonLines(target / "metrics.jsonl").append(
        [{name: float(f"{r.metrics[name]:.4g}") for name in museum.KEPT if name in r.metrics} for r in records]
    )
    groups = 2 * trainer.config.num_generations_per_prompt
    JsonLines(target / "completions.jsonl").append(
        [
            {"step": r.step} | {name: c[name] for name in ("prompt", "completion", "reward")}
            | {"advantage": round(c["advantage"], 4)}
            for r in records if r.step in museum.SHOWN_STEPS for c in r.completions[:groups]
        ]
    )  # fmt: skip
    info = {
        "name": f"museum/{exhibit}",
        "seed": museum.SEED,
        "model": "pocket",
        "changed": museum.SETTINGS,
        "config": {k: v for k, v in trainer.config.to_dict().items() if "output_dir" not in k},
        "command": f"python benchmarks/museum.py {exhibit}",
        **circumstances(),
        "seconds": round(seconds, 1),
        "after": after,
    }
    (target / "run.json").write_text(json.dumps(info, indent=1) + "\n")
    return info


def main() -> None:
    """Run what is missing, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exhibits", nargs="*", choices=[[], museum.HEALTHY, *museum.EXHIBITS], metavar="EXHIBIT")
    torch.set_num_threads(1)
    options = parser.parse_args()
    for exhibit in options.exhibits or [museum.HEALTHY, *museum.EXHIBITS]:
        if options.exhibits or not (RUNS / f"{exhibit}-seed{museum.SEED}" / "run.json").exists():
            info = record(exhibit)
            print(f"{exhibit:8} {info['seconds']:6.1f} s  right: {info['after']['eval/pass@1']:.1%}", flush=True)


if __name__ == "__main__":
    main()
