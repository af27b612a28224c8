"""`grpo-lab pretrain`: make a small model from random weights, for the task countdown4."""

import argparse
import os
from pathlib import Path


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "pretrain",
        help="pre-train a small model from random weights",
        description="Pre-train a character model on generated Countdown text; nothing is downloaded. The model knows "
        "the game and seldom wins; grpo-lab train --preset countdown4 --model-name FOLDER improves it.",
    )
    parser.add_argument("--output-dir", required=True, metavar="FOLDER", help="folder for the model and its card.json")
    parser.add_argument("--size", default="small", help="small (a minute on a CPU core), medium or large (for a GPU)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="number of training steps (default: depends on the size)")
    length.add_argument("--seconds", type=float, help="train for this time instead")
    parser.add_argument("--seed", type=int, default=0, help="random seed for weights and text (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu or mps (default: auto)")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    parser.add_argument("--overwrite-output-dir", action="store_true", help="replace what an earlier pretrain wrote")
    return parser


def run(options: argparse.Namespace) -> int:
    """Pre-train a model, save it, and print its accuracy."""
    folder = Path(options.output_dir)
    if folder.exists() and any(folder.iterdir()) and not options.overwrite_output_dir:
        raise ValueError(f"{folder} is not empty. Replace what it holds: --overwrite-output-dir. Or name another.")
    folder.mkdir(parents=True, exist_ok=True)  # fails now, and not after minutes of training
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py
    from grpo_lab.tasks.pretraining import pretrain, save

    settings = ("size", "steps", "seconds", "seed", "device", "precision")
    model, tokenizer, card = pretrain(**{name: getattr(options, name) for name in settings})
    save(folder, model, tokenizer, card)
    print(f"{card['task']}, right on problems kept for evaluation (sampled, greedily, at least one of 8):")
    for stage, rates in card["held_out"].items():
        print(f"  after {stage}: {', '.join(f'{rate:.1%}' for rate in rates.values())}")
    print(f"Written to {folder} after {card['seconds']:.0f} seconds. Go on:")
    print(f"  grpo-lab train --preset countdown4 --model-name {folder}")
    return 0
