"""Prompts: the dataset class, files, the built-in Countdown task, and an order that can be saved."""

import glob
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path
from random import Random
from typing import Any

import torch
from jinja2 import TemplateError  # transformers needs it for chat templates

Prompt = str | list[dict[str, str]]
Row = dict[str, Any]

FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_DEPTH = 50  # of brackets in JSON; the parser of datasets ends at 64


class SimplePromptDataset:
    """Prompts, and whatever else a reward function wants to know about them.

    Args:
        prompts: strings, or chats: lists of {"role": ..., "content": ...}.
        **columns: one value per prompt each; handed to the reward functions by name.
    Raises: ValueError if there is no prompt or a column has another length, TypeError for what is no prompt.

    >>> SimplePromptDataset(["2+2=", "3+3="], answer=["4", "6"])[1]
    {'prompt': '3+3=', 'answer': '6'}
    """

    def __init__(self, prompts: Sequence[Prompt], **columns: Sequence):
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got one string. One prompt? Use [prompt].")
        for name, values in columns.items():
            if isinstance(values, str):
                raise TypeError(f"column {name!r} must be a list with one value per prompt, got one string.")
        self.columns = {"prompt": list(prompts), **{name: list(values) for name, values in columns.items()}}
        if "prompt" in columns:
            raise ValueError('the column "prompt" is that of the prompts themselves: give the other one another name.')
        size = len(self.columns["prompt"])
        if size == 0:
            raise ValueError("the dataset is empty: at least one prompt is needed.")
        for i, prompt in enumerate(self.columns["prompt"]):
            check_prompt(prompt, i)
        for name, values in self.columns.items():
            if len(values) != size:
                raise ValueError(f"column {name!r} has {len(values)} values for {size} prompts.")

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    def __getitem__(self, index: int) -> Row:
        return {name: values[index] for name, values in self.columns.items()}

    def select(self, indices: Iterable[int]) -> "SimplePromptDataset":
        """Some of the rows, as `datasets.Dataset.select`."""
        rows = [self[i] for i in indices]
        return SimplePromptDataset(**{("prompts" if n == "prompt" else n): [r[n] for r in rows] for n in self.columns})


def check_prompt(prompt: Any, index: int) -> None:
    """Raises ValueError or TypeError if this is neither a text nor a chat."""
    is_chat = (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) and isinstance(m["content"], str) for m in prompt)
    )
    if not isinstance(prompt, str) and not is_chat:
        raise TypeError(
            f'prompt {index} must be a string or a list of {{"role": ..., "content": text}}, got {repr(prompt)[:80]}.'
        )
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError(f"prompt {index} is empty.")


def checked_dataset(dataset, name: str):
    """The dataset, if a trainer can use it; raises TypeError or ValueError, with the cure, if not."""
    if isinstance(dataset, str | dict) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        got = f"{type(dataset).__name__}: take one split of it" if isinstance(dataset, dict) else repr(dataset)
        raise TypeError(f"{name} must be a SimplePromptDataset or a datasets.Dataset, got {got}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: at least one prompt is needed.")
    if not isinstance(dataset[0], dict) or "prompt" not in dataset[0]:
        found = ", ".join(dataset[0]) if isinstance(dataset[0], dict) else type(dataset[0]).__name__
        raise ValueError(f'{name} needs a column "prompt", found {found}. Plain strings? SimplePromptDataset(prompts).')
    if not isinstance(dataset, SimplePromptDataset):  # that class has looked already
        for index, prompt in enumerate(dataset["prompt"]):
            check_prompt(prompt, index)
    if taken := {"prompts", "completions"} & set(dataset[0]):
        raise ValueError(
            f"{name} has a column {min(taken)!r}, the name of an argument of every reward function. Rename it."
        )
    return dataset


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a text, or of a chat through the tokenizer's template with the assistant's turn opened.

    Raises: ValueError if a chat meets a tokenizer without a chat template, or nothing is left of a prompt.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the prompts are chats, but the tokenizer has no chat template. "
                "Use text prompts, or the tokenizer of an instruct model."
            )
        text = chat_text(tokenizer, prompt, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
    if not ids:
        raise ValueError(f"the tokenizer leaves nothing of the prompt {str(prompt)[:60]!r}.")
    return list(ids)


def chat_text(tokenizer, chat: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """A chat as the tokenizer's template writes it.

    Some templates refuse a system's turn (Gemma's), some leave it out without a word: then what it says begins the
    user's turn.
    Raises: ValueError if the template refuses the chat.
    """
    roles = [message["role"] for message in chat[:2]]
    system = chat[0]["content"].strip() if roles == ["system", "user"] else ""
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, tokenize=False)
        if system in text:
            return text
    except TemplateError as error:
        if not system:
            raise ValueError(
                f"the tokenizer's chat template refuses a prompt: {error}. Other roles, in turn?"
            ) from None
    first = {**chat[1], "content": f"{system}\n\n{chat[1]['content']}"}
    return chat_text(tokenizer, [first, *chat[2:]], add_generation_prompt=add_generation_prompt)


def longest_prompts(dataset, number: int = 8) -> list[Prompt]:
    """The longest texts, which are nearly always the longest in tokens, found without encoding them all."""
    prompts = [dataset[i]["prompt"] for i in range(len(dataset))]
    return sorted(prompts, key=lambda prompt: len(str(prompt)))[-number:]


def load_prompts(name: str, *, prompt_column: str = "prompt", answer_column: str | None = None, split: str = "train"):
    """A `datasets.Dataset` from a local .txt (a prompt a line), .jsonl, .json, .csv or .parquet, or from the Hub.

    Args:
        name: a file, or a Hub id; "owner/name:config" picks a configuration.
        prompt_column: which column holds the prompts; it is renamed to "prompt".
        answer_column: which holds the answers; it is renamed to "answer", and no answer may be empty.
        split: of a Hub dataset.
    Raises: ValueError that names the file and the problem.
    """
    try:
        import datasets  # an optional dependency, and slow to import
    except ImportError:
        raise ValueError("reading datasets needs one more package: pip install -c constraints.txt datasets") from None

    path = Path(name).expanduser()
    kind = FILE_FORMATS.get(path.suffix.lower())
    hub_id, _, config = name.partition(":")
    if kind is not None:
        if not path.is_file():
            raise ValueError(f"there is no file {name}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty: at least one prompt is needed.")
        where = {"path": kind, "data_files": glob.escape(str(path)), "split": "train"}
        if kind == "text":
            where["encoding"] = "utf-8-sig"  # Windows writes a mark at the start, which is no part of the prompt
    elif os.path.lexists(path) or not hub_id:  # a link to nowhere is no Hub id either
        raise ValueError(f"{name} is neither a Hub id nor a file that ends in {', '.join(FILE_FORMATS)}.")
    else:
        where = {"path": hub_id, "name": config or None, "split": split}
    try:
        if kind == "json":
            check_json(path.read_text(encoding="utf-8-sig"))
        dataset = datasets.load_dataset(**where)
    except Exception as error:  # a broken line, no network, no such dataset: each with its own exception class
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # a CSV file that ends after its header
            raise ValueError(f"{name} is empty: at least one prompt is needed.") from None
        cure = ". Save it as UTF-8" if isinstance(cause, UnicodeDecodeError) else ""
        cure = cure or ("" if kind else ". Without a network, give files: --dataset FILE --eval-dataset FILE")
        raise ValueError(f"could not read the dataset {name}: {' '.join(str(cause).split())[:300]}{cure}") from error
    if "__index_level_0__" in dataset.column_names:  # pandas takes the first fields for names of the rows
        raise ValueError(f'{name}: the rows have more fields than the header. Write a prompt with commas "in quotes".')
    if kind == "text":
        dataset = dataset.rename_column("text", "prompt").filter(lambda row: row["prompt"].strip() != "")
    dataset = with_prompt_column(dataset, "prompt" if kind == "text" else prompt_column, name)
    return dataset if answer_column is None else with_answer_column(dataset, answer_column, name)


def check_json(text: str) -> None:
    """Raises ValueError if this is neither one list of objects nor an object on each line.

    datasets would find out too, but a line `null` or 10,000 brackets take its parser, and Python with it, down.
    """
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        if text.lstrip().startswith("["):
            raise
        rows = [_json_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f'row {i} must be an object such as {{"prompt": "2+2="}}, got {json.dumps(row)[:40]}')
        depth, level = 0, [row]
        while level and depth <= MAX_DEPTH:
            level = [x for v in level if isinstance(v, list | dict) for x in (v.values() if isinstance(v, dict) else v)]
            depth += 1
        if level:
            raise ValueError(f"row {i} is nested more than {MAX_DEPTH} deep")


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error.msg} at character {error.pos + 1})") from None


def with_prompt_column(dataset, prompt_column: str, name: str = "the dataset"):
    """The `datasets.Dataset` with its prompts in the column "prompt".

    Raises: ValueError if it is empty, has no such column, or a prompt is no prompt: an empty cell, a number.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: at least one prompt is needed.")
    dataset = _renamed(dataset, prompt_column, "prompt", name)
    for i, prompt in enumerate(dataset["prompt"]):
        try:
            check_prompt(prompt, i)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    return dataset


def with_answer_column(dataset, answer_column: str, name: str = "the dataset"):
    """The `datasets.Dataset` with its answers in the column "answer".

    Raises: ValueError if there is no such column, or an answer is missing or empty.
    """
    dataset = _renamed(dataset, answer_column, "answer", name)
    for i, answer in enumerate(dataset["answer"]):
        if answer is None or not str(answer).strip():
            raise ValueError(f"{name}: answer {i} is empty.")
    return dataset


def _renamed(dataset, column: str, wanted: str, name: str):
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}, only {', '.join(dataset.column_names)}. "
            f"Name the right one with --{wanted}-column."
        )
    if column != wanted and wanted in dataset.column_names:
        dataset = dataset.remove_columns(wanted)
    return dataset.rename_column(column, wanted) if column != wanted else dataset


def as_chats(dataset, system_prompt: str) -> SimplePromptDataset:
    """The same rows with prompts that are chats and begin with this system prompt, in place of one that is there.

    >>> as_chats(SimplePromptDataset(["2+2="]), "Be brief.")[0]["prompt"]
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '2+2='}]
    """

    def chat(prompt: Prompt) -> Prompt:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [{"role": "system", "content": system_prompt}, *messages[messages[0]["role"] == "system" :]]

    rows = [dataset[i] for i in range(len(checked_dataset(dataset, "the dataset")))]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return SimplePromptDataset([chat(prompt) for prompt in columns.pop("prompt")], **columns)


EXAMPLE_PROMPTS = (
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "What is the capital of France?",
    "Give three tips for learning to cook.",
    "Describe a sunrise to someone who has never seen one.",
    "Why do leaves change colour in autumn?",
    "Summarise the story of Romeo and Juliet in two sentences.",
    "How does a bicycle stay upright?",
)
"""What the command line trains on if it is given a model and no dataset."""


# --- Countdown: three or four numbers from 2 to 9 and a target from 0 to 99; prompt "3,5,7:22=", answer "5*3+7" --

HELD_OUT_PERCENT = 17

# The operators of the tidy forms, and when the numbers between them stand in the one order that is written: what
# commutes is written once, the larger number first.
FORMS: dict[int, dict[str, Callable[..., bool]]] = {
    3: {
        "*+": lambda a, b, c: a >= b,
        "+-": lambda a, b, c: a >= b,
        "++": lambda a, b, c: a >= b >= c,
        "**": lambda a, b, c: a >= b >= c,
    },
    4: {
        "+++": lambda a, b, c, d: a >= b >= c >= d,
        "++-": lambda a, b, c, d: a >= b >= c,
        "*++": lambda a, b, c, d: a >= b and c >= d,
        "*+-": lambda a, b, c, d: a >= b,
        "*+*": lambda a, b, c, d: a >= b and c >= d and (a, b) >= (c, d),
        "*-*": lambda a, b, c, d: a >= b and c >= d,
    },
}


def countdown_dataset(size: int, *, numbers: int = 3, split: str = "train", seed: int = 0) -> SimplePromptDataset:
    """Solvable Countdown prompts, all different; reward them with `grpo_lab.rewards.countdown`.

    Whether a problem (target, and numbers in any order) belongs to "train" or "held-out" depends on
    nothing but the problem, so no held-out problem ever occurs in training, under any seed.

    Args:
        numbers: how many numbers a problem has, 3 or 4.
    Raises: ValueError if the split has fewer than `size` prompts.

    >>> countdown_dataset(2, seed=1)[0]
    {'prompt': '4,8,4:36='}
    >>> countdown_dataset(2, numbers=4)[0]
    {'prompt': '3,7,3,4:20='}
    """
    prompts = [
        countdown_prompt(order, target)
        for chosen, target in countdown_problems(split, numbers)
        for order in sorted(set(permutations(chosen)))
    ]
    if size > len(prompts):
        raise ValueError(
            f"there are only {len(prompts)} Countdown prompts in the split {split!r}, {size} were asked for."
        )
    return SimplePromptDataset(Random(f"{seed}/{split}").sample(prompts, size))


def countdown_prompt(numbers: Sequence[int], target: int) -> str:
    """What the model is asked.

    >>> countdown_prompt([3, 5, 7], 22)
    '3,5,7:22='
    """
    return f"{','.join(map(str, numbers))}:{target}="


@cache
def countdown_problems(split: str, numbers: int = 3) -> list[tuple[tuple[int, ...], int]]:
    """All problems of "train" or "held-out": numbers in ascending order, and a target that can be hit."""
    if split not in ("train", "held-out"):
        raise ValueError(f'split must be "train" or "held-out", got {split!r}.')

    def held_out(numbers: tuple[int, ...], target: int) -> bool:
        return zlib.crc32(countdown_prompt(numbers, target).encode()) % 100 < HELD_OUT_PERCENT

    return [
        (chosen, target)
        for chosen in countdown_numbers(numbers)
        for target in sorted(countdown_expressions(chosen))
        if 0 <= target <= 99 and held_out(chosen, target) == (split == "held-out")
    ]


def countdown_numbers(numbers: int) -> list[tuple[int, ...]]:
    """All choices of so many numbers from 2 to 9, each in ascending order. Raises ValueError unless it is 3 or 4."""
    if numbers not in FORMS:
        raise ValueError(f"Countdown has {' or '.join(map(str, FORMS))} numbers here, got {numbers}.")
    return list(combinations_with_replacement(range(2, 10), numbers))


@cache
def countdown_expressions(numbers: tuple[int, ...]) -> dict[int, list[str]]:
    """Value -> expressions of a few tidy forms that use the numbers once each.

    With three numbers a+b+c, a+b-c, a*b+c, a*b*c; with four a+b+c+d, a+b+c-d, a*b+c+d, a*b+c-d, a*b+c*d, a*b-c*d.
    Few forms and no 1 (multiplying by 1 and adding 0 look alike) make a task that a small model can master.

    >>> countdown_expressions((3, 5, 7))
    {22: ['5*3+7'], 1: ['5+3-7'], 26: ['7*3+5'], 5: ['7+3-5'],
     38: ['7*5+3'], 9: ['7+5-3'], 15: ['7+5+3'], 105: ['7*5*3']}
    """
    found: dict[int, list[str]] = {}
    for order in sorted(set(permutations(numbers))):
        for operators, tidy in FORMS[len(numbers)].items():
            if tidy(*order):
                text = str(order[0]) + "".join(f"{o}{n}" for o, n in zip(operators, order[1:], strict=True))
                found.setdefault(countdown_value(order, operators), []).append(text)
    return found


def countdown_value(numbers: Sequence[int], operators: str) -> int:
    """The value of numbers with the operators + - * between them.

    >>> countdown_value([5, 3, 7], "*+")
    22
    """
    total, term = 0, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            term *= number
        else:
            total, term = total + term, number if operator == "+" else -number
    return total + term


# --- Order ---------------------------------------------------------------------------------------------


@dataclass
class PromptOrder:
    """Which prompts come next: every epoch a new shuffle, drawn from the seed and the epoch's number alone.

    Its whole state is (epoch, cursor), so a resumed run goes on exactly where it stopped. The last
    batch of an epoch may be smaller than the others; no prompt is dropped and none comes twice.

    Args:
        size: number of prompts in the dataset.
        batch_size: prompts per batch.
        seed: of the shuffles.
    """

    size: int
    batch_size: int
    seed: int
    epoch: int = 0
    cursor: int = 0

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has, the last, smaller one included."""
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """Indices of the next batch; goes on for ever."""
        if self.cursor >= self.size:
            self.epoch, self.cursor = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", self.epoch))
        order = torch.randperm(self.size, generator=generator)
        batch = order[self.cursor : self.cursor + self.batch_size].tolist()
        self.cursor += len(batch)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.cursor = state["epoch"], state["cursor"]


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for each purpose and step, so that no draw depends on what was drawn before it."""
    return zlib.crc32(f"{seed}/{purpose}/{number}".encode())
