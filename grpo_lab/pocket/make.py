"""Makes the pocket model: `python -m grpo_lab.pocket.make`, some minutes on one CPU core.

Like the text that real models are trained on, the text of this one has authors of different quality. The
careful author solves the problem. The careless one mostly adds everything up, or makes a slip. The
model first reads the careful author alone, so that it can play Countdown; then both, mostly the careless
one, so that it seldom does. The ability is there and is rarely shown: that is what GRPO has to bring out.

No held-out problem (grpo_lab.data.countdown_problems) occurs in either phase. What lets so small a model
generalise to them is text about problems without a solution, answered by the nearest expression.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo_lab import pocket
from grpo_lab.data import countdown_dataset, countdown_expressions, countdown_problems, countdown_prompt, encode_prompt
from grpo_lab.forward import evaluating
from grpo_lab.rewards import countdown, solves
from grpo_lab.sampling import left_pad, sample

CHARACTERS = "0123456789+-*/(),:="
LONGEST = 24  # tokens of a line of text, its end included
BATCH = 128
NEAR_SHARE = 0.65  # of the text: problems without a solution
NEAR = 6  # how far from the target the nearest expression may be
CAREFUL_SHARE = 0.29  # of the text of the second phase
SUM, OPERATOR = 0.78, 0.13  # the careless author: adds up, takes a wrong operator, else uses a number twice


def make_tokenizer(characters: Iterable[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character; characters that it does not know are dropped.

    It is a byte-pair encoding without a single merge, because that is what `AutoTokenizer` makes of any
    tokenizer that it finds beside a Qwen2 model.
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token=None, padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Three layers of Qwen2, untrained: 446,000 weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


# --- the text --------------------------------------------------------------------------------------------


@cache
def near_problems() -> list[tuple[tuple[int, ...], int, list[str]]]:
    """Problems without a solution, each with the expressions whose value comes nearest."""
    problems = []
    for numbers in combinations_with_replacement(range(2, 10), 3):
        values = countdown_expressions(numbers)
        for target in set(range(100)) - values.keys():
            gap = min(abs(value - target) for value in values)
            if gap <= NEAR:
                problems.append((numbers, target, values.get(target - gap, []) + values.get(target + gap, [])))
    return problems


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


# --- the training ----------------------------------------------------------------------------------------


def make_optimizers(model: Qwen2ForCausalLM, learning_rate: float, *, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all; with `muon`, Muon for the matrices inside the layers: it generalised further in equal time."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if muon and p.ndim == 2 and "embed" not in name]
    inside = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in inside]
    groups = [
        {"params": [p for p in others if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True))
    return optimizers


def read(model, tokenizer, *, steps: int, careful_share: float, learning_rate: float, muon: bool, random: Random):
    """Ordinary language-model training on the text, with warmup and cosine decay to a fiftieth."""
    model.train()
    optimizers = make_optimizers(model, learning_rate, muon=muon)
    warmup = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    for step in range(1, steps + 1):
        ids, labels = make_batch(random, tokenizer, careful_share)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 250 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def accuracy(model, tokenizer, *, size: int = 400, greedy: bool = False, seed: int = 0) -> float:
    """Share of held-out problems solved, sampled at temperature 1 or greedily."""
    dataset = countdown_dataset(size, split="held-out", seed=seed)
    prompts = [dataset[i]["prompt"] for i in range(size)]
    ids, mask = left_pad([encode_prompt(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id)
    uniforms = torch.rand(size, 16, generator=torch.Generator().manual_seed(seed))
    with evaluating(model):
        rollouts = sample(
            model, ids, mask, num_generations=1, uniforms=uniforms, end_ids=[tokenizer.eos_token_id],
            pad_id=tokenizer.pad_token_id, top_k=1 if greedy else 0,
        )  # fmt: skip
    return sum(countdown(prompts, tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True))) / size


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
    read(model, tokenizer, steps=first, careful_share=1.0, learning_rate=3e-3, muon=True, random=random)
    ability = accuracy(model, tokenizer)
    read(model, tokenizer, steps=second, careful_share=CAREFUL_SHARE, learning_rate=7e-4, muon=False, random=random)
    seconds = time.perf_counter() - began

    folder = options.output / "model"
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()  # measured as it will be loaded: rounded to bfloat16
    card = {
        "command": "python -m grpo_lab.pocket.make",
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


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
