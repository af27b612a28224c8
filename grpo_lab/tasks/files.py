"""Read prompts and answers from files (.txt, .jsonl, .json, .csv, .parquet) or the Hugging Face Hub."""

import glob
import json
import os
from pathlib import Path
from typing import Any

from grpo_lab.rollout.prompts import check_prompt

FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_DEPTH = 50  # nesting depth of a JSON row; the parser of datasets allows 64


def load_prompts(name: str, *, prompt_column: str = "prompt", answer_column: str | None = None, split: str = "train"):
    """Return a `datasets.Dataset` from a .txt (one prompt per line), .jsonl, .json, .csv or .parquet file or the Hub.

    Args:
        name: a file, or a Hub id; "owner/name:config" selects a configuration.
        prompt_column: the column with the prompts; it is renamed to "prompt".
        answer_column: the column with the answers; it is renamed to "answer", and no answer may be empty.
        split: the split of a Hub dataset.
    Raises: ValueError that names the file and the problem.
    """
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        raise ValueError("reading datasets needs one more package: pip install datasets") from None

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
            where["encoding"] = "utf-8-sig"  # drops the byte order mark that Windows writes
    elif os.path.lexists(path) or not hub_id:  # a broken link is not a Hub id either
        raise ValueError(f"{name} is neither a Hub id nor a file that ends in {', '.join(FILE_FORMATS)}.")
    else:
        where = {"path": hub_id, "name": config or None, "split": split}
    try:
        if kind == "json":
            check_json(path.read_text(encoding="utf-8-sig"))
        dataset = datasets.load_dataset(**where)
    except Exception as error:  # datasets raises many exception classes
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # a CSV file with a header only
            raise ValueError(f"{name} is empty: at least one prompt is needed.") from None
        cure = ". Save it as UTF-8" if isinstance(cause, UnicodeDecodeError) else ""
        cure = cure or ("" if kind else ". Without a network, give files: --dataset FILE --eval-dataset FILE")
        raise ValueError(f"could not read the dataset {name}: {' '.join(str(cause).split())[:300]}{cure}") from error
    if "__index_level_0__" in dataset.column_names:  # pandas takes extra fields for an index
        raise ValueError(f'{name}: the rows have more fields than the header. Write a prompt with commas "in quotes".')
    if kind == "text":
        dataset = dataset.rename_column("text", "prompt").filter(lambda row: row["prompt"].strip() != "")
    dataset = with_prompt_column(dataset, "prompt" if kind == "text" else prompt_column, name)
    return dataset if answer_column is None else with_answer_column(dataset, answer_column, name)


def check_json(text: str) -> None:
    """Raise ValueError unless the text is one list of objects, or one object per line.

    The parser of datasets crashes the interpreter on a line `null` or on 10,000 nested brackets.
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
    """Return the `datasets.Dataset` with its prompts in the column "prompt".

    Raises: ValueError if it is empty, has no such column, or a prompt is invalid, such as an empty cell or a number.
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
    """Return the `datasets.Dataset` with its answers in the column "answer".

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
"""Prompts for `grpo-lab train` with a model and without a dataset."""
