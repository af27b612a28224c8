"""Kill a run again and again, at random moments, and see whether anything was lost.

    python benchmarks/kill.py                100 kills, spread over twelve kinds of run
    python benchmarks/kill.py --kills 10

Each run is killed with SIGKILL at a random moment, inside a save too, and resumed from its newest checkpoint,
until it has ended. Then its weights, metrics and completions must equal, bit for bit, those of a run that
nobody killed. (Needs an operating system with fork: Linux or macOS.)
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

import torch

from grpo_lab import GRPOConfig, GRPOTrainer, pocket
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.training import output_dir

DROPOUT = {"kl_coef": 0.05, "disable_dropout": False}
KINDS = [
    {"num_iterations": iterations, "gradient_accumulation_steps": accumulation, "batch_size": 4 // accumulation, **rest}
    for iterations, accumulation, rest in itertools.product(
        (1, 2), (1, 2), ({"kl_coef": 0.0}, DROPOUT, {**DROPOUT, "lora_rank": 4})
    )
]


def make_trainer(folder: Path, settings: dict) -> GRPOTrainer:
    """A short run of the pocket model over two epochs, with dropout in the model."""
    model, tokenizer = pocket.load()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    config = GRPOConfig.preset(
        "pocket", output_dir=str(folder), num_generations_per_prompt=4, max_steps=None, num_epochs=2, warmup_steps=2,
        save_steps=1, save_total_limit=2, logging_steps=2, **settings,
    )  # fmt: skip
    return GRPOTrainer(model, None, countdown, tokenizer, config, countdown_dataset(14))


def go_on(folder: Path, settings: dict) -> None:
    """Start the run, or resume it if there is something to resume; in a process of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the progress bar, and what a run says
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resume = bool(output_dir.all_checkpoints(folder))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint: nothing was promised yet
    make_trainer(folder, settings).train(resume=resume)


def run_until(folder: Path, settings: dict, seconds: float | None) -> bool:
    """Whether the run ended before it was killed after so many seconds."""
    process = multiprocessing.get_context("fork").Process(target=go_on, args=(folder, settings))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed by itself, with exit code {process.exitcode}: {settings}")
    return process.exitcode == 0


def result(folder: Path) -> dict[str, str]:
    """Hashes of what a run leaves: weights, metrics without their times, completions."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    contents = {
        "weights": (folder / "final_model" / "model.safetensors").read_bytes(),
        "metrics": json.dumps([{k: v for k, v in row.items() if k != "step_time"} for row in rows]).encode(),
        "completions": (folder / "completions.jsonl").read_bytes(),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def survives(settings: dict, kills: int, random: Random, folder: Path) -> tuple[int, bool]:
    """Kill runs of one kind until so many kills have been made: (kills, whether all results were the same)."""
    began = time.perf_counter()
    run_until(folder / "whole", settings, None)
    length = time.perf_counter() - began
    expected, made = result(folder / "whole"), 0
    while made < kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        while not run_until(folder / "killed", settings, random.uniform(0.05, length) if made < kills else None):
            made += 1
        if result(folder / "killed") != expected:
            return made, False
    return made, True


def main() -> None:
    """Print a line per kind of run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random, total = Random(options.seed), 0
    for number, settings in enumerate(KINDS):
        share = (options.kills * (number + 1)) // len(KINDS) - (options.kills * number) // len(KINDS)
        with tempfile.TemporaryDirectory() as folder:
            made, same = survives(settings, share, random, Path(folder))
        total += made
        print(f"{made:4} kills, {'nothing lost' if same else 'THE RESULT DIFFERS'}: {settings}", flush=True)
        if not same:
            raise SystemExit(1)
    print(f"{total} kills survived")


if __name__ == "__main__":
    main()
