"""Pre-train a small character model on generated Countdown text, as a start for GRPO; no download needed.

The model is trained on the careful author's text alone, until it can solve problems; then on the text of both authors,
mostly the careless one, after which it seldom does (countdown_text.py). So the ability is there, and GRPO can bring it
out. The embedded pocket model was made in the same way (pocket/make.py).
"""

import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from grpo_lab.hardware.devices import autocast, resolve_device, resolve_precision
from grpo_lab.hardware.system import threads_for
from grpo_lab.models.forward import evaluating
from grpo_lab.models.loading import without_progress_bars
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.rollout.sampling import left_pad, sample
from grpo_lab.tasks.character_model import make_model, make_tokenizer
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.tasks.countdown_text import Batches, batches, make_corpus

# --- training ----------------------------------------------------------------------------------------------


def make_optimizers(model: Qwen2ForCausalLM, learning_rate: float, *, muon: bool) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or with `muon` Muon for the layers' matrices and AdamW for the rest.

    In equal time, models trained with Muon generalised better.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if muon and p.ndim == 2 and "embed" not in name]
    inside = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in inside]
    groups = [
        {"params": [p for p in others if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    fused = model.device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=fused)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True))
    return optimizers


def train_lm(
    model,
    text: Batches,
    *,
    learning_rate: float,
    muon: bool,
    steps: int | None = None,
    seconds: float | None = None,
    precision: str = "fp32",
) -> dict[str, float]:
    """Train a language model with linear warmup and a cosine decay to 2 % of the peak learning rate.

    Args:
        text: batches of token ids [B, S] and labels [B, S].
        steps, seconds: the length of the training; give one of them. With `steps` the result depends on the seeds only.
    Returns: "steps", the number of steps made, and "loss", the mean over the last 20 of them in nats per token.
    """
    model.train()
    optimizers = make_optimizers(model, learning_rate, muon=muon)
    scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")
    began, step, losses = time.perf_counter(), 0, []
    while True:
        spent, budget = (step, steps) if steps else (time.perf_counter() - began, seconds)
        if step and spent >= budget:
            break
        warmup = (step + 1) / max(1, min(100, steps // 10)) if steps else 20 * spent / budget
        factor = min(warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        ids, labels = next(text)
        with autocast(model.device, precision):
            logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
        scaler.scale(loss).backward()
        _step(optimizers, scaler, model, factor)
        step += 1
        losses = [*losses[-19:], loss.detach()]
        if step % 250 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    model.eval()
    return {"steps": step, "loss": torch.stack(losses).mean().item()}


def _step(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, model, factor: float) -> None:
    """Clip the gradients to norm 1 and step all optimizers, with their peak learning rates times `factor`."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # one gradient that is not finite makes the norm, and so all clipped gradients, NaN; the scaler looked at each
    # optimizer's gradients before that, and would skip one optimizer only
    all_finite = not scaler.is_enabled() or norm.isfinite()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        if all_finite:
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()


# --- evaluation --------------------------------------------------------------------------------------------


def solved_mask(
    model, tokenizer, *, numbers: int = 3, size: int = 400, K: int = 1, greedy: bool = False, seed: int = 0
):
    """Sample K answers to each of `size` held-out problems, at temperature 1 or greedily.

    Returns: [size, K] bool, True where an answer solves its problem.
    """
    dataset = countdown_dataset(size, numbers=numbers, split="held-out", seed=seed)
    prompts = dataset.columns["prompt"]
    ids, mask = left_pad([encode_prompt(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id)
    uniforms = torch.rand(size * K, 16, generator=torch.Generator().manual_seed(seed))
    with evaluating(model):
        rollouts = sample(
            model, ids.to(model.device), mask.to(model.device), num_generations=K, uniforms=uniforms,
            end_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id, top_k=1 if greedy else 0,
        )  # fmt: skip
    texts = tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
    return torch.tensor(countdown([p for p in prompts for _ in range(K)], texts)).view(size, K) == 1


def accuracy(model, tokenizer, **settings) -> float:
    """Return the fraction of held-out problems solved; see `solved_mask` for the settings."""
    return _fraction(solved_mask(model, tokenizer, **settings))


def held_out_accuracy(
    model, tokenizer, numbers: int, *, size: int = 400, K: int = 8, seed: int = 0
) -> dict[str, float]:
    """Return the fractions of held-out problems solved: in one sample, greedily, and in at least one of K samples."""
    sampled = solved_mask(model, tokenizer, numbers=numbers, size=size, K=K, seed=seed)
    greedy = solved_mask(model, tokenizer, numbers=numbers, size=size, greedy=True, seed=seed)
    return {"sampled": _fraction(sampled), "greedy": _fraction(greedy), f"pass@{K}": _fraction(sampled.any(1))}


def _fraction(mask: Tensor) -> float:
    return mask.sum().item() / mask.numel()


# --- pre-training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The shape of a model and how it is trained."""

    hidden_size: int
    layers: int
    heads: int
    batch: int
    """Lines of text per step."""
    steps: int
    """Steps of both phases together."""
    learning_rate: float
    """Peak learning rate of AdamW, for embeddings, norms and biases; Muon has its own for the layers' matrices."""


SIZES = {
    "small": Size(hidden_size=64, layers=2, heads=4, batch=128, steps=700, learning_rate=3e-3),  # 0.13 M parameters
    "medium": Size(hidden_size=128, layers=4, heads=4, batch=128, steps=5000, learning_rate=3e-3),  # 1.1 M
    "large": Size(hidden_size=512, layers=6, heads=8, batch=2048, steps=5000, learning_rate=2e-3),  # 25 M
}
SECOND_PHASE_SHARE = 0.1  # share of the steps or seconds for the second phase, on the text of both authors
CAREFUL_SHARE = 0.29  # share of the careful author's lines in that text


def pretrain(
    size: str = "small",
    *,
    numbers: int = 4,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train a model from random weights that can solve Countdown problems and seldom does, ready for GRPO.

    Args:
        size: small (for a CPU core), medium or large (for a GPU); see SIZES.
        numbers: how many numbers a Countdown problem has, 3 or 4.
        steps, seconds: length of both phases together; give at most one. If neither is given: the size's steps.
            The same seed and steps give the same model on the same machine; with seconds it depends on the speed.
        device, precision: as in GRPOConfig.
    Returns: the model (on the device, weights in float32), its tokenizer, and its card: how it was made, and which
        fraction of held-out problems it solves after each phase.
    Raises: ValueError for an unknown size or device, or an impossible length or seed.
    """
    _check_arguments(size, steps, seconds, seed)
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    settings = SIZES[size]
    if steps is None and seconds is None:
        steps = settings.steps

    began = time.perf_counter()
    tokenizer = make_tokenizer()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, hidden_size=settings.hidden_size, layers=settings.layers, heads=settings.heads)
    model.to(device)
    threads = threads_for(model)
    with _num_threads(threads):
        result = _train_phases(model, tokenizer, settings, numbers, steps, seconds, seed, precision)
    card = {
        "task": f"Countdown with {numbers} numbers",
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "budget": f"{steps} steps" if steps else f"{seconds:g} seconds",
        **result,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - began, 1),
        **_environment(device, threads, precision),
    }
    return model, tokenizer, card


def _check_arguments(size: str, steps: int | None, seconds: float | None, seed: int) -> None:
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}. Sizes: {', '.join(SIZES)}.")
    if steps is not None and seconds is not None:
        raise ValueError(f"give steps or seconds, not both; got {steps} and {seconds}.")
    if (steps is not None and steps < 2) or (seconds is not None and not 0 < seconds < math.inf):
        raise ValueError(f"steps must be at least 2, seconds more than 0, got {seconds if steps is None else steps}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 4294967295, got {seed}.")


def _train_phases(
    model,
    tokenizer: PreTrainedTokenizerFast,
    settings: Size,
    numbers: int,
    steps: int | None,
    seconds: float | None,
    seed: int,
    precision: str,
) -> dict[str, Any]:
    """Train on the careful author's text, then on that of both; return the card's entries about it."""
    if steps:
        second = max(1, round(SECOND_PHASE_SHARE * steps))
        lengths = {"steps": steps - second}, {"steps": second}
    else:
        second = SECOND_PHASE_SHARE * seconds
        lengths = {"seconds": seconds - second}, {"seconds": second}
    corpus = make_corpus(numbers).to(model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    phases = [(1.0, settings.learning_rate, True), (CAREFUL_SHARE, settings.learning_rate / 4, False)]
    results, accuracies = [], []
    for length, (careful_share, learning_rate, muon) in zip(lengths, phases, strict=True):
        lines = batches(corpus, settings.batch, careful_share, generator)
        results.append(train_lm(model, lines, learning_rate=learning_rate, muon=muon, precision=precision, **length))
        accuracies.append(held_out_accuracy(model, tokenizer, numbers))
    made = [result["steps"] for result in results]
    return {
        "steps": made,
        "lines": sum(made) * settings.batch,
        "loss": [result["loss"] for result in results],
        "held_out": dict(zip(("the careful author", "both authors"), accuracies, strict=True)),
    }


@contextmanager
def _num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment(device: str, threads: int, precision: str) -> dict[str, Any]:
    """Return the card's entries about machine and software."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device}, {processor()}",
        "threads": threads,
        "precision": precision,
        "versions": {"python": platform.python_version(), **versions},
    }


def processor() -> str:
    """Return the CPU's name if the system provides it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(folder: str | Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, card: dict[str, Any]) -> None:
    """Write a folder that `from_pretrained` and `grpo-lab train --model-name` load; card.json says how it was made."""
    with without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
