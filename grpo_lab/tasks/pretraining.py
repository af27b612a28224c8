"""A model from nothing: a character model that reads generated Countdown text and learns to play, no download needed.

Like the text that real models are trained on, this one has authors of different quality. The careful author solves
the problem. The careless one mostly adds everything up, or makes a slip. The model first reads the careful author
alone, so that it can play; then both, mostly the careless one, so that it seldom does. The ability is there and is
rarely shown: that is what GRPO has to bring out.

No held-out problem (`countdown_problems`) occurs in either phase. What lets a small model generalise to
them is text about problems without a solution, answered by the nearest expression. The embedded pocket model was made
in the same way (pocket/make.py); here whole batches of text are written at once, on the device that reads them.
"""

import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo_lab.hardware.devices import autocast, resolve_device, resolve_precision
from grpo_lab.hardware.system import threads_for
from grpo_lab.models.forward import evaluating
from grpo_lab.models.loading import without_progress_bars
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.rollout.sampling import left_pad, sample
from grpo_lab.tasks.countdown import (
    countdown_dataset,
    countdown_expressions,
    countdown_numbers,
    countdown_problems,
    countdown_value,
)

CHARACTERS = "0123456789+-*/(),:="
NEAR_SHARE = 0.65  # of the text: problems without a solution
NEAR = 6  # how far from the target the nearest expression may be
SUM, OPERATOR = 0.78, 0.13  # the careless author: adds up, takes a wrong operator, else uses a number twice

Batches = Iterator[tuple[Tensor, Tensor]]


# --- model and tokenizer ---------------------------------------------------------------------------------


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


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 96, layers: int = 3, heads: int = 4
) -> Qwen2ForCausalLM:
    """A Qwen2 over single characters, untrained; 446,000 weights if nothing is said."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


# --- the text --------------------------------------------------------------------------------------------


@cache
def near_problems(numbers: int = 3) -> list[tuple[tuple[int, ...], int, list[str]]]:
    """Problems without a solution, each with the expressions whose value comes nearest."""
    problems = []
    for chosen in countdown_numbers(numbers):
        values = countdown_expressions(chosen)
        for target in set(range(100)) - values.keys():
            gap = min(abs(value - target) for value in values)
            if gap <= NEAR:
                problems.append((chosen, target, values.get(target - gap, []) + values.get(target + gap, [])))
    return problems


class Text(NamedTuple):
    """Everything that the authors may write, as token ids: N problems, the solvable ones first, and their E answers."""

    solvable: int
    """How many of the N problems have a solution."""
    numbers: Tensor
    """[N, n] token ids of a problem's numbers, in ascending order."""
    target: Tensor
    """[N, 2] token ids of its target's tens and ones."""
    short: Tensor
    """[N] bool, True where the target has no tens."""
    sum_is_right: Tensor
    """[N] bool, True where adding up solves the problem."""
    first: Tensor
    """[N] where the problem's answers begin among the E."""
    answers: Tensor
    """[N] how many there are."""
    answer: Tensor
    """[E, 2n - 1] careful answers."""
    mistakes: Tensor
    """[E, 2, M, 2n - 1] each with wrong operators, and with a number used twice; from 0 on those that do not solve."""
    mistaken: Tensor
    """[E, 2] how many those are, at least 1."""
    orders: Tensor
    """[n!, n] the orders in which the numbers of a prompt may stand."""
    marks: Tensor
    """[6] token ids of , : = + the end, and padding."""

    def to(self, device: str) -> "Text":
        """The same tables on another device."""
        return Text(self.solvable, *(table.to(device) for table in self[1:]))


@cache
def make_text(numbers: int) -> Text:
    """The tables from which `write_lines` draws; a second's work, done once."""
    tokenizer = make_tokenizer()
    id_of = torch.zeros(128, dtype=torch.long)
    for character in CHARACTERS:
        id_of[ord(character)] = tokenizer.convert_tokens_to_ids(character)

    def ids(texts: Iterable[str]) -> Tensor:
        texts = list(texts)
        characters = torch.frombuffer(bytearray("".join(texts), "ascii"), dtype=torch.uint8)
        return id_of[characters.long()].view(len(texts), -1)

    train = countdown_problems("train", numbers)
    solvable = [(chosen, target, countdown_expressions(chosen)[target]) for chosen, target in train]
    problems = solvable + near_problems(numbers)
    lengths = torch.tensor([len(answers) for _, _, answers in problems])
    mistakes = [mistakes_in(answer, target) for _, target, answers in problems for answer in answers]
    most = max(len(texts) for kinds in mistakes for texts in kinds)
    filled = [(texts * most)[:most] for kinds in mistakes for texts in kinds]
    marks = torch.tensor([*id_of[[ord(c) for c in ",:=+"]].tolist(), tokenizer.eos_token_id, tokenizer.pad_token_id])
    return Text(
        solvable=len(solvable),
        numbers=ids("".join(map(str, chosen)) for chosen, _, _ in problems),
        target=ids(f"{target:02d}" for _, target, _ in problems),
        short=torch.tensor([target < 10 for _, target, _ in problems]),
        sum_is_right=torch.tensor([sum(chosen) == target for chosen, target, _ in problems]),
        first=lengths.cumsum(0) - lengths,
        answers=lengths,
        answer=ids(answer for _, _, answers in problems for answer in answers),
        mistakes=ids(text for texts in filled for text in texts).view(len(mistakes), 2, most, -1),
        mistaken=torch.tensor([[len(texts) for texts in kinds] for kinds in mistakes]),
        orders=torch.tensor(list(permutations(range(numbers)))),
        marks=marks,
    )


def mistakes_in(answer: str, target: int) -> list[list[str]]:
    """What a slip makes of an expression of one-digit numbers: another operator, or a number in another's place.

    Where one kind is impossible or hits the target all the same, the other kind stands for both.

    >>> mistakes_in("5+3", 8)
    [['5-3', '5*3'], ['3+3', '5+5']]
    """
    places = range(len(answer))

    def put(place: int, character: str) -> str:
        return answer[:place] + character + answer[place + 1 :]

    operators = [put(i, o) for i in places[1::2] for o in "+-*" if o != answer[i]]
    operators = [text for text in operators if countdown_value([int(n) for n in text[::2]], text[1::2]) != target]
    twice = [put(i, answer[j]) for i in places[::2] for j in places[::2] if answer[i] != answer[j]]
    return [operators or twice, twice or operators]


def write_lines(text: Text, uniforms: Tensor, careful_share: float) -> tuple[Tensor, Tensor]:
    """Lines of text, all at once: a prompt, an answer and an end.

    Args:
        uniforms: [B, 7] numbers in [0, 1), on the device of the text: who writes what is decided by nothing else.
        careful_share: of the lines that the careful author writes.
    Returns: [B, 4n + 3] token ids, and labels that leave out prompt and padding (-100).
    """

    def choose(column: int, among: Tensor | int) -> Tensor:
        return (uniforms[:, column] * among).long()

    B, n = uniforms.shape[0], text.numbers.shape[1]
    near = len(text.numbers) - text.solvable
    problem = torch.where(uniforms[:, 0] < NEAR_SHARE, text.solvable + choose(1, near), choose(1, text.solvable))
    numbers = text.numbers[problem].gather(1, text.orders[choose(2, len(text.orders))])
    comma, colon, equals, plus, end, padding = text.marks.expand(B, -1).split(1, 1)

    expression = text.first[problem] + choose(3, text.answers[problem])
    habit = uniforms[:, 5]
    kind = (habit >= SUM + OPERATOR).long()
    slip = text.mistakes[expression, kind, choose(6, text.mistaken[expression, kind])]
    added_up = torch.stack([numbers, plus.expand(B, n)], 2).flatten(1)[:, :-1]
    adds_up = (habit < SUM) & ~text.sum_is_right[problem]
    careless = torch.where(adds_up[:, None], added_up, slip)
    answer = torch.where((uniforms[:, 4] < careful_share)[:, None], text.answer[expression], careless)

    listed = torch.stack([numbers, comma.expand(B, n)], 2).flatten(1)[:, :-1]
    line = torch.cat([listed, colon, text.target[problem], equals, answer, end, padding], 1)
    head = 2 * n + 3  # tokens of a prompt whose target has two digits
    labels = torch.cat([torch.full_like(line[:, :head], -100), answer, end, torch.full_like(end, -100)], 1)
    # a target below 10 has no tens: what follows moves one to the left
    columns = torch.arange(line.shape[1] - 1, device=line.device)
    source = columns + (text.short[problem][:, None] & (columns >= 2 * n))
    return line.gather(1, source), labels.gather(1, source)


def batches(text: Text, size: int, careful_share: float, generator: torch.Generator, *, ahead: int = 64) -> Batches:
    """Batches of `size` lines for ever, written `ahead` batches at a time, so that no device waits for its text."""
    while True:
        uniforms = torch.rand(ahead * size, 7, generator=generator, device=generator.device)
        ids, labels = write_lines(text, uniforms, careful_share)
        yield from zip(ids.split(size), labels.split(size), strict=True)


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
    fused = model.device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=fused)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True))
    return optimizers


def read(
    model,
    text: Batches,
    *,
    learning_rate: float,
    muon: bool,
    steps: int | None = None,
    seconds: float | None = None,
    precision: str = "fp32",
) -> dict[str, float]:
    """Ordinary language-model training on the text, with warmup and cosine decay to a fiftieth.

    Args:
        text: batches of token ids [B, S] and labels [B, S].
        steps, seconds: how long; one of them. With `steps` the result depends on nothing but the seeds.
    Returns: the steps made, and the mean loss of the last of them in nats per token.
    """
    model.train()
    optimizers = make_optimizers(model, learning_rate, muon=muon)
    scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")
    began, step, losses = time.perf_counter(), 0, []
    while True:
        spent, budget = (step, steps) if steps else (time.perf_counter() - began, seconds)
        if step and spent >= budget:
            break
        risen = (step + 1) / max(1, min(100, steps // 10)) if steps else 20 * spent / budget
        factor = min(risen, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        ids, labels = next(text)
        with autocast(model.device, precision):
            logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # the norm of all makes every gradient NaN if one is, and the scaler looks at each optimizer's own, before
        whole = not scaler.is_enabled() or norm.isfinite()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            if whole:
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        step += 1
        losses = [*losses[-19:], loss.detach()]
        if step % 250 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    model.eval()
    return {"steps": step, "loss": torch.stack(losses).mean().item()}


def solved(model, tokenizer, *, numbers: int = 3, size: int = 400, K: int = 1, greedy: bool = False, seed: int = 0):
    """Which held-out problems are solved, sampled at temperature 1 or greedily? Returns [size, K] bool."""
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


def accuracy(model, tokenizer, *, greedy: bool = False, **settings) -> float:
    """Share of held-out problems solved; see `solved`."""
    return _share(solved(model, tokenizer, greedy=greedy, **settings))


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- the whole of it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model, and how it reads."""

    hidden_size: int
    layers: int
    heads: int
    batch: int
    """Lines of text per step."""
    steps: int
    """Of the careful author, then of both."""
    learning_rate: float
    """Of AdamW at its peak, for embeddings, norms and biases; the matrices inside have Muon's."""


SIZES = {
    "small": Size(hidden_size=64, layers=2, heads=4, batch=128, steps=700, learning_rate=3e-3),  # 0.13 M weights
    "medium": Size(hidden_size=128, layers=4, heads=4, batch=128, steps=5000, learning_rate=3e-3),  # 1.1 M
    "large": Size(hidden_size=512, layers=6, heads=8, batch=2048, steps=5000, learning_rate=2e-3),  # 25 M
}
BOTH_SHARE = 0.1  # of the steps or seconds: the second phase, in which both authors are read
CAREFUL_SHARE = 0.29  # of its text


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
    """A model from random weights that can play Countdown and seldom does, ready for GRPO.

    Args:
        size: small (for a CPU core), medium or large (for a GPU); see SIZES.
        numbers: of a Countdown problem, 3 or 4.
        steps, seconds: how long it reads, both phases together; at most one of them. Neither: the size's steps.
            The same seed and steps give the same model on the same machine; with seconds its speed has a say.
        device, precision: as in GRPOConfig.
    Returns: the model (on the device, weights in float32), its tokenizer, and its card: how it was made, and which
        share of held-out problems it solves, after the careful author alone and at the end.
    Raises: ValueError for a size, device or length that does not exist.
    """
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}. Sizes: {', '.join(SIZES)}.")
    if steps is not None and seconds is not None:
        raise ValueError(f"give steps or seconds, not both; got {steps} and {seconds}.")
    if (steps is not None and steps < 2) or (seconds is not None and not 0 < seconds < math.inf):
        raise ValueError(f"steps must be at least 2, seconds more than 0, got {seconds if steps is None else steps}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 4294967295, got {seed}.")
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    chosen = SIZES[size]
    if steps is None and seconds is None:
        steps = chosen.steps

    began = time.perf_counter()
    text = make_text(numbers).to(device)
    tokenizer = make_tokenizer()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, hidden_size=chosen.hidden_size, layers=chosen.layers, heads=chosen.heads)
    model.to(device)
    random = torch.Generator(device).manual_seed(seed)

    both = {"seconds": BOTH_SHARE * seconds} if seconds else {"steps": max(1, round(BOTH_SHARE * steps))}
    careful = {"seconds": seconds - both["seconds"]} if seconds else {"steps": steps - both["steps"]}

    def phase(careful_share: float, learning_rate: float, **length) -> dict[str, float]:
        lines = batches(text, chosen.batch, careful_share, random)
        return read(model, lines, learning_rate=learning_rate, precision=precision, **length)

    threads = threads_for(model)
    with _threads(threads):
        first = phase(1.0, chosen.learning_rate, muon=True, **careful)
        ability = held_out(model, tokenizer, numbers)
        second = phase(CAREFUL_SHARE, chosen.learning_rate / 4, muon=False, **both)
        in_the_end = held_out(model, tokenizer, numbers)
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    card = {
        "task": f"Countdown with {numbers} numbers",
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "budget": f"{steps} steps" if steps else f"{seconds:g} seconds",
        "steps": [first["steps"], second["steps"]],
        "lines": (first["steps"] + second["steps"]) * chosen.batch,
        "loss": [first["loss"], second["loss"]],
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device}, {processor()}",
        "threads": threads,
        "precision": precision,
        "versions": {"python": platform.python_version(), **versions},
        "held_out": {"the careful author": ability, "both authors": in_the_end},
    }
    return model, tokenizer, card


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def held_out(model, tokenizer, numbers: int, *, size: int = 400, K: int = 8, seed: int = 0) -> dict[str, float]:
    """Shares of held-out problems solved: in one sample, greedily, and by at least one of K samples."""
    sampled = solved(model, tokenizer, numbers=numbers, size=size, K=K, seed=seed)
    greedy = solved(model, tokenizer, numbers=numbers, size=size, greedy=True, seed=seed)
    return {"sampled": _share(sampled), "greedy": _share(greedy), f"pass@{K}": _share(sampled.any(1))}


def _share(right: Tensor) -> float:
    return right.sum().item() / right.numel()


def save(folder: str | Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, card: dict[str, Any]) -> None:
    """A folder that `from_pretrained` loads and `grpo-lab train --model-name` takes; card.json says how it was made."""
    with without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
