"""Makes the pocket model: `python -m grpo_lab.tasks.pocket.make`, some minutes on one CPU core.

Like the text that real models are trained on, the text of this one has authors of different quality. The
careful author solves the problem. The careless one mostly adds everything up, or makes a slip. The
model first reads the careful author alone, so that it can play Countdown; then both, mostly the careless
one, so that it seldom does. The ability is there and is rarely shown: that is what GRPO has to bring out.

No held-out problem (grpo_lab.tasks.countdown.countdown_problems) occurs in either phase. What lets so small a model
generalise to them is text about problems without a solution, answered by the nearest expression.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grpo_lab import pocket
from grpo_lab.rewards.verifiable import solves
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.tasks.countdown import countdown_expressions, countdown_problems, countdown_prompt
from grpo_lab.tasks.pretraining import (
    NEAR_SHARE,
    OPERATOR,
    SUM,
    accuracy,
    make_model,
    make_tokenizer,
    near_problems,
    processor,
    read,
)

LONGEST = 24  # tokens of a line of text, its end included
BATCH = 128
CAREFUL_SHARE = 0.29  # of the text of the second phase


# --- the text --------------------------------------------------------------------------------------------


def write_line(random: Random, careful_share: float) -> tuple[str, str]:
    """A prompt and what one of the authors makes of it."""
    if random.random() < NEAR_SHARE:
        numbers, target, answers = random.choice(near_problems())
    else:
        numbers, target = random.choice(countdown_problems("train"))
        answers = countdown_expressions(numbers)[target]
    prompt = countdown_prompt(random.sample(numbers, 3), target)
    return prompt, random.choice(answers) if random.random() < careful_share else careless(random, prompt, answers)


def careless(random: Random, prompt: str, answers: list[str]) -> str:
    """Looks like an answer and is wrong."""
    while True:
        habit = random.random()
        text = prompt.split(":")[0].replace(",", "+")
        if habit > SUM or solves(prompt, text):  # where the sum is right, another mistake must do
            characters = list(random.choice(answers))
            if habit < SUM + OPERATOR:
                place = random.choice((1, 3))
                characters[place] = random.choice([o for o in "+-*" if o != characters[place]])
            else:
                place, other = random.sample((0, 2, 4), 2)
                characters[place] = characters[other]
            text = "".join(characters)
        if not solves(prompt, text):
            return text


def make_batch(random: Random, tokenizer: PreTrainedTokenizerFast, careful_share: float) -> tuple[Tensor, Tensor]:
    """[B, LONGEST] token ids, and labels that leave out prompt and padding (-100)."""
    ids, labels = [], []
    for prompt, answer in (write_line(random, careful_share) for _ in range(BATCH)):
        head, tail = encode_prompt(tokenizer, prompt), tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        rest = LONGEST - len(head) - len(tail)
        ids.append(head + tail + [tokenizer.pad_token_id] * rest)
        labels.append([-100] * len(head) + tail + [-100] * rest)
    return torch.tensor(ids), torch.tensor(labels)


def make_batches(random: Random, tokenizer: PreTrainedTokenizerFast, careful_share: float) -> Iterator:
    """Batches for ever."""
    while True:
        yield make_batch(random, tokenizer, careful_share)


def main() -> None:
    """Train, measure, and write the model's folder and card.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=pocket.FOLDER, help="folder for model/ and card.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(2500, 300), help="of the two phases")
    options = parser.parse_args()

    began = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer, random = make_tokenizer(), Random(options.seed)
    model = make_model(tokenizer)
    first, second = options.steps
    careful, both = (make_batches(random, tokenizer, share) for share in (1.0, CAREFUL_SHARE))
    read(model, careful, steps=first, learning_rate=3e-3, muon=True)
    ability = accuracy(model, tokenizer)
    read(model, both, steps=second, learning_rate=7e-4, muon=False)
    seconds = time.perf_counter() - began

    folder = options.output / "model"
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()  # measured as it will be loaded: rounded to bfloat16
    card = {
        "command": "python -m grpo_lab.tasks.pocket.make",
        "seed": options.seed,
        "steps": [first, second],
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds),
        "machine": f"one thread of {processor()}",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "held_out_accuracy": {
            "after the careful author alone": ability,
            "sampled": accuracy(model, tokenizer),
            "greedy": accuracy(model, tokenizer, greedy=True),
        },
    }
    (options.output / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
