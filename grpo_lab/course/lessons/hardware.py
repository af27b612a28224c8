"""What fits where: a configuration for the device at hand, and what a training step keeps in memory."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from grpo_lab.course.checks import Case, Judge
from grpo_lab.rollout.scoring import completion_logprobs
from grpo_lab.training.evaluation import pass_at_k

GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """A model and the settings to train it with."""

    model_name: str
    settings: dict[str, Any]


# (least memory in GiB, choice), from the largest GPU to none. Not measured on each of these devices.
CHOICES: tuple[tuple[float, Choice], ...] = (
    (70, Choice("Qwen/Qwen2.5-1.5B-Instruct", {"batch_size": 8, "num_generations_per_prompt": 8,
                                               "gradient_accumulation_steps": 1})),
    (35, Choice("Qwen/Qwen2.5-1.5B-Instruct", {"batch_size": 2, "num_generations_per_prompt": 8,
                                               "gradient_accumulation_steps": 4})),
    (20, Choice("Qwen/Qwen2.5-0.5B-Instruct", {"batch_size": 2, "num_generations_per_prompt": 8,
                                               "gradient_accumulation_steps": 4})),
    (0, Choice("Qwen/Qwen2.5-0.5B-Instruct", {"batch_size": 1, "num_generations_per_prompt": 8, "lora_rank": 16,
                                              "gradient_accumulation_steps": 8, "gradient_checkpointing": True})),
)  # fmt: skip
COMMON = {
    "max_new_tokens": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "kl_coef": 0.02, "warmup_steps": 10,
    "max_steps": 200, "logging_steps": 1, "save_steps": 100, "save_total_limit": 1,
}  # fmt: skip


def choose(gpu_memory: int | None) -> Choice:
    """Return the model and settings for a GPU with this many bytes of memory, or for a CPU (None).

    >>> choose(None).model_name, choose(16 * GIB).settings["lora_rank"], choose(80 * GIB).settings["batch_size"]
    ('pocket', 16, 8)
    """
    if gpu_memory is None:
        return Choice("pocket", {"max_steps": 60, "save_steps": 30})
    found = next(choice for least, choice in CHOICES if gpu_memory >= least * GIB)
    rate = 2e-5 if "lora_rank" in found.settings else 2e-6
    return Choice(found.model_name, {**COMMON, "learning_rate": rate, **found.settings})


pass_at_k_judge = Judge(
    contract="pass_at_k(n, correct, k) -> the chance that at least one of k answers is right, when correct of n are",
    reference=pass_at_k,
    hint="Draw k of the n answers without putting any back. In how many of the draws are all of them wrong?",
    cases=(
        Case("one answer of two, one is right", 2, 1, 1),
        Case("both of two, one is right", 2, 1, 2),
        Case("none is right", 4, 0, 2),
        Case("all are right", 4, 4, 3),
        Case("two of four, one is right", 4, 1, 2),
        Case("two of four, two are right", 4, 2, 2),
        Case("more draws than wrong answers", 8, 6, 4),
        Case("many", 64, 5, 8),
    ),
    diagnoses={
        "you put the answers back: 1 - (1 - correct/n)^k": lambda n, correct, k: 1 - (1 - correct / n) ** k,
        "you give the share of right answers, whatever k is": lambda n, correct, k: correct / n,
        "you add the chances up, and they are not exclusive": lambda n, correct, k: min(1.0, k * correct / n),
        "a chance cannot exceed 1: you add chances up that do not exclude each other": lambda n, correct, k: (
            k * correct / n
        ),
        "you give the chance that all of the k are wrong": lambda n, correct, k: 1 - pass_at_k(n, correct, k),
        "you ask that all of the k be right": lambda n, correct, k: math.comb(correct, k) / math.comb(n, k),
        "you say 1 as soon as one of the n is right": lambda n, correct, k: float(correct > 0),
        "you count exactly one right answer among the k": lambda n, correct, k: (
            correct * math.comb(n - correct, k - 1) / math.comb(n, k)
        ),
    },
)


def kept_for_backward(model: nn.Module, rows: int, prompt_tokens: int, new_tokens: int) -> int:
    """Return the bytes that one forward pass over completions keeps for its backward pass, without the weights.

    This is the part that grows with the batch. Counted by autograd's hooks, so the same on every device.

    Args:
        rows: B, completions at a time.
        prompt_tokens, new_tokens: of each row. All rows differ: prompts in common would be read once, and count once.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, prompt_tokens + new_tokens), generator=draws).to(device)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        completion_logprobs(model, ids, torch.ones_like(ids), new_tokens, dedup=False).sum()
    return sum(storages.values())


def draw_memory(figure: Figure, measured: dict[str, int]) -> str:
    """Draw bars of bytes, each compared with the first, and describe them in words."""
    axes = figure.subplots()
    figure.subplots_adjust(left=0.36, right=0.92, bottom=0.2, top=0.95)
    names, sizes = list(measured), [size / 2**20 for size in measured.values()]
    bars = axes.barh(names, sizes, color=["#999999"] + ["#0072B2"] * (len(names) - 1))
    axes.bar_label(bars, labels=[f"{size / sizes[0]:.0%}" for size in sizes], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("kept for the backward pass, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    return "\n".join(f"{name}: {size:.1f} MiB" for name, size in zip(names, sizes, strict=True))


def draw_accuracy(figure: Figure, before: dict[str, float], after: dict[str, float], k: int) -> str:
    """Draw the share of right answers before and after, with 95 % intervals, and describe it in words."""
    axes = figure.subplots()
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.14, top=0.92)
    names = {"one answer, greedy": "pass@1_greedy", "one answer, sampled": "pass@1", f"one of {k}": f"pass@{k}"}
    words = []
    for shift, colour, label, result in ((-0.17, "#999999", "before", before), (0.17, "#0072B2", "after", after)):
        shares = [result[f"eval/{key}"] for key in names.values()]
        spans = [[s - result[f"eval/{key}_low"] for s, key in zip(shares, names.values(), strict=True)],
                 [result[f"eval/{key}_high"] - s for s, key in zip(shares, names.values(), strict=True)]]  # fmt: skip
        places = [place + shift for place in range(3)]
        axes.bar(places, shares, 0.3, yerr=spans, capsize=4, color=colour, label=label)
        words.append(f"{label}: " + ", ".join(f"{n} {s:.1%}" for n, s in zip(names, shares, strict=True)))
    axes.set_xticks(range(3), names)
    axes.set(ylim=(0, 1.08), ylabel="share of problems answered right")
    axes.legend(frameon=False, ncols=2, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return "\n".join(words)
