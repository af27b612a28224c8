"""Make the pocket model: `python -m grpo_lab.tasks.pocket.make`, about 17 minutes on one CPU core.

The model is trained on the careful author's text alone, until it can solve Countdown problems; then on the text of both
authors, mostly the careless one, after which it seldom does. So the ability is there, and GRPO can bring it out. No
held-out problem (`countdown_problems`) occurs in the text.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grpo_lab import pocket
from grpo_lab.rewards.verifiable import solves
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.tasks.character_model import make_model, make_tokenizer
from grpo_lab.tasks.countdown import countdown_expressions, countdown_problems, countdown_prompt
from grpo_lab.tasks.countdown_text import OPERATOR_SHARE, SUM_SHARE, UNSOLVABLE_SHARE, Batches, unsolvable_problems
from grpo_lab.tasks.pretraining import accuracy, processor, train_lm

MAX_LENGTH = 24  # tokens of a line of text, with its <eos>
BATCH = 128
CAREFUL_SHARE = 0.29  # share of the careful author's lines in the second phase

# countdown_text.py writes the same kind of text as tensors, seven random numbers to a line. The shipped weights came
# from the lines below, which draw from random.Random as often as it takes until a careless answer is wrong. They stay,
# so that this script still makes the same weights.


def write_line(random: Random, careful_share: float) -> tuple[str, str]:
    """Return a prompt and the answer of one of the two authors."""
    if random.random() < UNSOLVABLE_SHARE:
        numbers, target, answers = random.choice(unsolvable_problems())
    else:
        numbers, target = random.choice(countdown_problems("train"))
        answers = countdown_expressions(numbers)[target]
    prompt = countdown_prompt(random.sample(numbers, 3), target)
    careful = random.random() < careful_share
    return prompt, random.choice(answers) if careful else careless_answer(random, prompt, answers)


def careless_answer(random: Random, prompt: str, answers: list[str]) -> str:
    """Return a wrong answer: all numbers added up, or one of the answers with a mistake."""
    while True:
        habit = random.random()
        text = prompt.split(":")[0].replace(",", "+")
        if habit > SUM_SHARE or solves(prompt, text):  # where the sum is right, make another mistake
            characters = list(random.choice(answers))
            if habit < SUM_SHARE + OPERATOR_SHARE:
                place = random.choice((1, 3))
                characters[place] = random.choice([o for o in "+-*" if o != characters[place]])
            else:
                place, other = random.sample((0, 2, 4), 2)
                characters[place] = characters[other]
            text = "".join(characters)
        if not solves(prompt, text):
            return text


def make_batch(random: Random, tokenizer: PreTrainedTokenizerFast, careful_share: float) -> tuple[Tensor, Tensor]:
    """Return [B, MAX_LENGTH] token ids, and labels in which prompt and padding are -100."""
    ids, labels = [], []
    for prompt, answer in (write_line(random, careful_share) for _ in range(BATCH)):
        head, tail = encode_prompt(tokenizer, prompt), tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        rest = MAX_LENGTH - len(head) - len(tail)
        ids.append(head + tail + [tokenizer.pad_token_id] * rest)
        labels.append([-100] * len(head) + tail + [-100] * rest)
    return torch.tensor(ids), torch.tensor(labels)


def make_batches(random: Random, tokenizer: PreTrainedTokenizerFast, careful_share: float) -> Batches:
    """Yield batches without end."""
    while True:
        yield make_batch(random, tokenizer, careful_share)


def main() -> None:
    """Train and evaluate the model, then write its folder and card.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=pocket.FOLDER, help="folder for model/ and card.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(2500, 300), help="steps of each phase")
    options = parser.parse_args()

    began = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer, random = make_tokenizer(), Random(options.seed)
    model = make_model(tokenizer)
    first, second = options.steps
    careful, both = (make_batches(random, tokenizer, share) for share in (1.0, CAREFUL_SHARE))
    train_lm(model, careful, steps=first, learning_rate=3e-3, muon=True)
    after_first = accuracy(model, tokenizer)
    train_lm(model, both, steps=second, learning_rate=7e-4, muon=False)
    seconds = time.perf_counter() - began

    folder = options.output / "model"
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()  # evaluate the weights as they will be loaded, rounded to bfloat16
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
            "after the careful author alone": after_first,
            "sampled": accuracy(model, tokenizer),
            "greedy": accuracy(model, tokenizer, greedy=True),
        },
    }
    (options.output / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
