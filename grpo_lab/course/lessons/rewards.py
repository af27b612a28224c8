"""Notebook 03: texts that parsers get wrong, a reward model learned from preferences, rewards that invite hacking."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Qwen2Config

from grpo_lab import GRPOConfig, GRPOTrainer, pocket
from grpo_lab.rewards.verifiable import countdown, evaluate_expression
from grpo_lab.tasks.countdown import countdown_dataset, countdown_problems, countdown_prompt

# (text, the number that it gives as its answer)
TRAPS = (
    ("The answer is 42.", "42"),
    ("The answer is -42.", "-42"),
    ("It costs $1,250.", "1250"),
    ("So x = 3.50", "3.5"),
    ("20 - 8 = 12, that is a dozen", "12"),
    ("#### 7 (not 8)", "7"),
    ("I cannot say.", None),
)


def last_digits(text: str) -> str | None:
    """Return the last run of digits: the parser that most people write first."""
    found = re.findall(r"\d+", text)
    return found[-1] if found else None


# --- Preferences ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and which of them the annotator preferred."""

    prompt: str
    chosen: str
    rejected: str


def taste(completion: str) -> float:
    """Return the annotator's hidden taste: *, no -, and the larger number first."""
    first, second = completion[0], completion[2]
    return 2.0 * completion.count("*") - 2.0 * completion.count("-") + 3.0 * (first >= second)


def preference_pairs(size: int, *, seed: int) -> list[Pair]:
    """Return pairs of random answers, each chosen with its Bradley-Terry probability under `taste`."""
    random = Random(seed)
    problems = countdown_problems("train")

    def answer(numbers: tuple[int, ...]) -> str:
        a, b, c = random.sample(numbers, 3)
        return f"{a}{random.choice('+-*')}{b}{random.choice('+-*')}{c}"

    pairs = []
    for _ in range(size):
        numbers, target = random.choice(problems)
        one, two = answer(numbers), answer(numbers)
        first = random.random() < torch.tensor(taste(one) - taste(two)).sigmoid().item()
        pairs.append(Pair(countdown_prompt(numbers, target), *((one, two) if first else (two, one))))
    return pairs


def tiny_classifier(tokenizer, *, seed: int = 0) -> PreTrainedModel:
    """Return a sequence-classification model with one output and random weights, of the Qwen2 architecture."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the loss of the annotator's choices under the scores, in nats per pair.

        P(chosen beats rejected) = sigmoid(score of chosen - score of rejected);  loss = -mean log P

    Source: Bradley and Terry (1952); as a loss for reward models, InstructGPT (arXiv 2203.02155).

    >>> round(bradley_terry_loss(torch.tensor([0.0]), torch.tensor([0.0])).item(), 4)  # a coin: log 2
    0.6931
    """
    return -logsigmoid(chosen - rejected).mean()


def scores(model: PreTrainedModel, tokenizer, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Return the model's logit for each prompt with its completion: [B], with gradient."""
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)


def pair_scores(model: PreTrainedModel, tokenizer, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the scores of the chosen and of the rejected answers."""
    prompts = [pair.prompt for pair in pairs]
    both = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    chosen, rejected = scores(model, tokenizer, prompts * 2, both).chunk(2)
    return chosen, rejected


def train_reward_model(
    model: PreTrainedModel, tokenizer, pairs: Sequence[Pair], *, steps: int = 150, batch: int = 64
) -> list[float]:
    """Fit the model to the preferences, and return the loss of each step, in nats per pair."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=6e-3), []
    random = Random(0)
    for _ in range(steps):
        loss = bradley_terry_loss(*pair_scores(model, tokenizer, random.sample(pairs, batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- Rewards that invite hacking -----------------------------------------------------------------------


def share_of_target(prompt: str, completion: str) -> float:
    """Return the share of the target that the expression reaches; 0 if it is no expression, or uses other numbers."""
    given, goal = _problem(prompt)
    result = evaluate_expression(completion)
    if result is None or result[1] != given:
        return 0.0
    return float(result[0]) / max(1, goal)


def _problem(prompt: str) -> tuple[list[int], int]:
    *given, goal = map(int, re.findall(r"\d+", prompt))
    return sorted(given), goal


def part_marks(prompts, completions, **columns):
    """Return partial credit: half of the target earns half a mark."""
    return [share_of_target(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def capped_marks(prompts, completions, **columns):
    """Return partial credit, but at most one mark."""
    return [min(1.0, mark) for mark in part_marks(prompts, completions)]


def right(prompts, completions, **columns):
    """Return the Countdown reward, under a name of its own, as a metric that is not paid."""
    return countdown(prompts, completions)


def short_run(reward, folder: str, *, model: PreTrainedModel | None = None, steps: int = 30) -> GRPOTrainer:
    """Return a trainer of a model, by default a new pocket model, paid by `reward`; `right` is only measured."""
    fresh, tokenizer = pocket.load()
    model = fresh if model is None else model
    config = GRPOConfig.preset(
        "pocket", kl_coef=0.0, batch_size=8, max_steps=steps, save_steps=steps, reward_weights=(1.0, 0.0),
        output_dir=folder, overwrite_output_dir=True,
    )  # fmt: skip
    return GRPOTrainer(model, None, [reward, right], tokenizer, config, countdown_dataset(2048))
