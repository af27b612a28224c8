"""Record the reference runs of the course: sweeps over K, beta and the presets, and three collapses.

    python benchmarks/record.py                 all that are not recorded yet
    python benchmarks/record.py K-4 beta-0.1    these, with each of their seeds
    python benchmarks/record.py --list

Each run is a folder in runs/: run.json (settings, seed, versions, device, date, accuracy on 400 held-out problems
before and after), metrics.jsonl, and eight completions of every 25th step in completions.jsonl.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers

from grpo_lab import GRPOConfig, GRPOTrainer, pocket
from grpo_lab.algorithm import losses
from grpo_lab.course.lessons.rewards import part_marks
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.tasks.pocket.make import processor
from grpo_lab.training.config import PRESETS
from grpo_lab.training.metrics import JsonLines

RUNS = Path(__file__).parents[1] / "runs"
COMPLETIONS_PER_STEP = 128
KEPT = ("step", "reward", "reward_std", "frac_reward_zero_std", "loss", "kl", "entropy", "grad_norm", "learning_rate",
        "clip_ratio/region_mean", "completions/mean_length", "completions/clipped_ratio", "num_tokens")  # fmt: skip
VARIANTS = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo", "reinforce")


# name: (settings that differ from the pocket preset, seeds)
PLAN: dict[str, tuple[dict, range]] = {
    "pocket": ({}, range(5)),
    **{
        f"K-{K}": ({"num_generations_per_prompt": K, "batch_size": COMPLETIONS_PER_STEP // K}, range(3))
        for K in (2, 4, 16, 32)  # K-8 is the pocket run
    },
    **{f"beta-{beta:g}": ({"kl_coef": beta}, range(3)) for beta in (0.0, 0.1, 0.5, 2.0)},  # 0.02 likewise
    # two updates per rollout, without which clipping cannot act and some variants are the same
    **{f"preset-{name}": ({"num_iterations": 2, **PRESETS[name]}, range(3)) for name in VARIANTS},
    # paid by the hackable reward of notebook 03 alone; the right one, with weight 0, only watches
    "collapse-hacked-reward": ({"kl_coef": 0.0, "reward_weights": (1.0, 0.0)}, range(1)),
    "collapse-learning-rate": ({"learning_rate": 2e-2}, range(1)),
    "collapse-wrong-sign-kl": ({"kl_coef": 1.0}, range(1)),
}  # fmt: skip


@contextmanager
def wrong_sign():
    """The KL with the wrong sign, as long as it lasts: the policy is paid for leaving the reference."""
    right = losses.kl_estimate
    losses.kl_estimate = lambda *arguments, **settings: -right(*arguments, **settings)
    try:
        yield
    finally:
        losses.kl_estimate = right


def circumstances() -> dict:
    """When, with which code and on what a run was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "device": f"cpu, 1 thread of {processor()}, busy",
        "versions": versions | {"transformers": transformers.__version__},
    }


def record(name: str, changes: dict, seed: int) -> dict:
    """Make one run and write its folder; returns what run.json holds."""
    model, tokenizer = pocket.load()
    rewards = [part_marks, countdown] if name == "collapse-hacked-reward" else [countdown]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig.preset("pocket", seed=seed, output_dir=folder, overwrite_output_dir=True, **changes)
        plain = config.replace(reward_weights=None)
        held_out = countdown_dataset(400, split="held-out", seed=seed)
        judge = GRPOTrainer(model, model, countdown, tokenizer, plain.replace(kl_coef=0.0), held_out)
        problems = countdown_dataset(pocket.NUM_PROMPTS, seed=seed)
        trainer = GRPOTrainer(model, None, rewards, tokenizer, config, problems)
        before = judge.evaluate(held_out)
        began = time.perf_counter()
        with wrong_sign() if name == "collapse-wrong-sign-kl" else nullcontext():
            records = list(trainer.steps())
        seconds = time.perf_counter() - began
        after = judge.evaluate(held_out)
    target = RUNS / f"{name}-seed{seed}"
    target.mkdir(parents=True, exist_ok=True)
    for file in target.iterdir():
        file.unlink()
    rows = [
        {k: float(f"{r.metrics[k]:.5g}") for k in r.metrics if k in KEPT or k.startswith("rewards/")} for r in records
    ]
    JsonLines(target / "metrics.jsonl").append(rows)
    some = [r for r in records if r.step == 1 or r.step % 25 == 0]
    short = [{"step": r.step, **{k: c[k] for k in ("prompt", "completion", "reward", "advantage")}}
             for r in some for c in r.completions[:8]]  # fmt: skip
    JsonLines(target / "completions.jsonl").append(short)
    info = {
        "name": name,
        "seed": seed,
        "model": "pocket",
        "rewards": trainer.components.rewards.names,
        "changed": changes,
        "config": {k: v for k, v in config.to_dict().items() if "output_dir" not in k},
        "command": f"python benchmarks/record.py {name}",
        **circumstances(),
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
    }
    (target / "run.json").write_text(json.dumps(info, indent=1) + "\n")
    return info


def main() -> None:
    """Run what is missing, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PLAN], metavar="NAME")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.list:
        print(*PLAN, sep="\n")
        return
    for name in options.names or PLAN:
        changes, seeds = PLAN[name]
        for seed in seeds:
            if not options.names and (RUNS / f"{name}-seed{seed}" / "run.json").exists():
                continue
            info = record(name, changes, seed)
            print(f"{name:26} seed {seed}  {info['seconds']:6.1f} s  right: "
                  f"{info['before']['eval/pass@1']:.1%} → {info['after']['eval/pass@1']:.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
