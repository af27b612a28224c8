"""Does the default run learn, under every seed? And what do its neighbours do?

    python benchmarks/learning.py             the pocket preset, seeds 0 to 4
    python benchmarks/learning.py --search    each setting changed alone, seeds 0 to 2
    python benchmarks/learning.py --set learning_rate=3e-4 kl_coef=0.04 --seeds 0 1

Accuracy is measured on 400 held-out problems. All runs are recorded, the failures too:
benchmarks/results/learning.json (or --output).
"""

import argparse
import ast
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from grpo_lab import GRPOConfig, GRPOTrainer, pocket
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.tasks.pocket.make import processor

NEIGHBOURS = [
    {},
    {"learning_rate": 1.5e-4}, {"learning_rate": 3e-4}, {"learning_rate": 1.2e-3}, {"learning_rate": 2.4e-3},
    {"kl_coef": 0.0}, {"kl_coef": 0.1}, {"kl_coef": 0.5},
    {"num_generations_per_prompt": 2}, {"num_generations_per_prompt": 4}, {"num_generations_per_prompt": 16},
    {"batch_size": 4}, {"batch_size": 32},
    {"max_steps": 50}, {"max_steps": 200},
    {"num_iterations": 2}, {"scale_rewards": "none"}, {"lr_scheduler": "constant_with_warmup"},
]  # fmt: skip


def run(seed: int, changes: dict) -> dict:
    """One run of the pocket preset with changes: accuracy before and after, seconds of training."""
    model, tokenizer = pocket.load()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig.preset("pocket", seed=seed, output_dir=folder, overwrite_output_dir=True, **changes)
        trainer = GRPOTrainer(
            model, None, countdown, tokenizer, config,
            countdown_dataset(pocket.NUM_PROMPTS, seed=seed), countdown_dataset(400, split="held-out", seed=seed),
        )  # fmt: skip
        before = trainer.evaluate()
        began = time.perf_counter()
        records = list(trainer.steps())
        seconds = time.perf_counter() - began
        after = trainer.evaluate()
    return {
        "seed": seed,
        **changes,
        "seconds": round(seconds, 1),
        "sampled_before": before["eval/pass@1"],
        "sampled_after": after["eval/pass@1"],
        "greedy_before": before["eval/pass@1_greedy"],
        "greedy_after": after["eval/pass@1_greedy"],
        "kl_at_the_end": round(sum(r.metrics["kl"] for r in records[-10:]) / 10, 4) if config.kl_coef else None,
        "reward_of_the_last_ten_steps": round(sum(r.metrics["reward"] for r in records[-10:]) / 10, 4),
    }


def main() -> None:
    """Run, print a table as it grows, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--search", action="store_true", help="each setting changed alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings changed together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    together = {name: ast.literal_eval(value) for name, value in (item.split("=") for item in options.set)}
    plans = NEIGHBOURS if options.search else [together]
    seeds = options.seeds or (range(3) if options.search else range(5))
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{options.threads} thread(s) of {processor()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model_sha256": json.loads((pocket.FOLDER / "card.json").read_text())["sha256"],
        "runs": [],
    }
    print(f"{'changed':40} seed  seconds  sampled          greedy")
    for changes in plans:
        for seed in seeds:
            result = run(seed, changes)
            record["runs"].append(result)
            words = ", ".join(f"{k}={v}" for k, v in changes.items()) or "nothing"
            print(
                f"{words:40} {seed:4}  {result['seconds']:7.1f}  {result['sampled_before']:.1%} → "
                f"{result['sampled_after']:.1%}   {result['greedy_before']:.1%} → {result['greedy_after']:.1%}",
                flush=True,
            )
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
