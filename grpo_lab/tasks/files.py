"""Read prompts and answers from files (.txt, .jsonl, .json, .csv, .parquet) or the Hugging Face Hub."""

import csv
import glob
import io
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_lab.rollout.prompts import check_prompt

FILE_FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
MAX_DEPTH = 50  # nesting depth of a JSON row; Arrow allows 64


def load_prompts(name: str, *, prompt_column: str = "prompt", answer_column: str | None = None, split: str = "train"):
    """Return a `datasets.Dataset` from a .txt (one prompt per line), .jsonl, .json, .csv or .parquet file or the Hub.

    A CSV cell is a text as the file has it, an empty one None. JSON numbers stay numbers if `str` gives them back as
    written; a column that holds others (2.50, 30 digits), or several types, is turned into texts, as written.

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
    kind = path.suffix.lower()
    hub_id, _, config = name.partition(":")
    if kind in FILE_FORMATS:
        if not path.is_file():
            raise ValueError(f"there is no file {name}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty: at least one prompt is needed.")
        where = {"path": "parquet", "data_files": glob.escape(str(path)), "split": "train"}
    elif os.path.lexists(path) or not hub_id:  # a broken link is not a Hub id either
        raise ValueError(f"{name} is neither a Hub id nor a file that ends in {', '.join(FILE_FORMATS)}.")
    else:
        where = {"path": hub_id, "name": config or None, "split": split}
    prompt_column = "prompt" if kind == ".txt" else prompt_column
    try:
        if kind in READERS:  # not by datasets, which guesses types: 007 becomes 7, "2024-01-01" a datetime
            text = path.read_text(encoding="utf-8-sig") if kind != ".csv" else path.read_bytes().decode("utf-8-sig")
            dataset = datasets.Dataset.from_dict(READERS[kind](text, prompt_column))
        else:
            dataset = datasets.load_dataset(**where)
    except Exception as error:  # datasets raises many exception classes
        cause = error.__cause__ or error
        cure = ". Save it as UTF-8" if isinstance(cause, UnicodeDecodeError) else ""
        cure = cure or (
            "" if kind in FILE_FORMATS else ". Without a network, give files: --dataset FILE --eval-dataset FILE"
        )
        raise ValueError(f"could not read the dataset {name}: {' '.join(str(cause).split())[:300]}{cure}") from error
    dataset = with_prompt_column(dataset, prompt_column, name)
    return dataset if answer_column is None else with_answer_column(dataset, answer_column, name)


# --- texts and CSV ---------------------------------------------------------------------------------------


def read_lines(text: str, _: str) -> dict[str, list]:
    """Return the lines that are not blank as the column "prompt"."""
    return {"prompt": [line for line in text.split("\n") if line.strip()]}


_csv_limit = threading.Lock()


def read_csv(text: str, _: str) -> dict[str, list]:
    """Return the columns of a CSV file: every cell is a text, an empty one None.

    Raises: ValueError if a row has more cells than the header, or two columns have one name.
    """
    with _csv_limit:
        before = csv.field_size_limit(len(text) + 1)  # the limit is the interpreter's
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
        finally:
            csv.field_size_limit(before)
    if not rows:
        return {}
    header = [cell or f"Unnamed: {i}" for i, cell in enumerate(rows[0])]
    if twice := sorted({cell for cell in header if header.count(cell) > 1}):
        raise ValueError(f"two columns have the name {twice[0]!r}")
    for i, row in enumerate(rows[1:]):
        if len(row) > len(header):
            raise ValueError(f'row {i} has more fields than the header. Write a prompt with commas "in quotes"')
    return {name: [row[i] or None if i < len(row) else None for row in rows[1:]] for i, name in enumerate(header)}


# --- JSON ------------------------------------------------------------------------------------------------


class _Integer(str):
    """A JSON integer as written."""

    __slots__ = ()


class _Float(str):
    """Another JSON number as written."""

    __slots__ = ()


def read_json(text: str, prompt_column: str) -> dict[str, list]:
    """Return the columns of one list of objects, or of one object per line.

    Raises: ValueError for anything else, or if a column mixes lists, objects and plain values.
    """
    try:
        whole = _parse(text)
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
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _column(name, [row.get(name) for row in rows], name == prompt_column) for name in names}


def _parse(text: str) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"an object has a key twice: {', '.join(name for name, _ in pairs)[:60]}")
        return found

    return json.loads(text, parse_int=_Integer, parse_float=_Float, parse_constant=no_constant, object_pairs_hook=once)


def _json_line(line: str, number: int) -> Any:
    try:
        return _parse(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error.msg} at character {error.pos + 1})") from None


def _column(name: str, values: list, is_prompt: bool) -> list:
    """Return the values of a column, turned into texts where one place holds several types or inexact numbers."""
    kinds: dict[tuple, set[str]] = defaultdict(set)
    for value in values:
        for place, kind in _kinds(value, ()):
            kinds[place].add(kind)
    mixed = {place for place, found in kinds.items() if len(found) > 1 or "inexact number" in found}
    for place in mixed:
        if kinds[place] & {"list", "object"}:
            raise ValueError(f"the column {name!r} mixes types: {', '.join(sorted(kinds[place]))}")
    if is_prompt:  # a number among texts is no prompt
        for i, value in enumerate(values):
            check_prompt(_value(value, (), set()), i)
    return [_value(value, (), mixed) for value in values]


def _kinds(value: Any, place: tuple) -> Iterator[tuple[tuple, str]]:
    """Yield (place, type) of a value and all values in it; the elements of a list have one place."""
    if isinstance(value, list):
        yield place, "list"
        for element in value:
            yield from _kinds(element, (*place, None))
    elif isinstance(value, dict):
        yield place, "object"
        for key, element in value.items():
            yield from _kinds(element, (*place, key))
    elif isinstance(value, _Integer | _Float):
        exact = str(_number(value)) == value and (isinstance(value, _Float) or abs(_number(value)) < 2**63)
        yield place, type(value).__name__ if exact else "inexact number"
    elif value is not None:
        yield place, type(value).__name__


def _number(value: _Integer | _Float) -> int | float:
    # int() refuses thousands of digits; a float as long does not give them back, so the value stays a text
    return int(value) if isinstance(value, _Integer) and len(value) < 100 else float(value)


def _value(value: Any, place: tuple, as_text: set[tuple]) -> Any:
    if isinstance(value, list):
        return [_value(element, (*place, None), as_text) for element in value]
    if isinstance(value, dict):
        return {key: _value(element, (*place, key), as_text) for key, element in value.items()}
    if isinstance(value, _Integer | _Float):
        return str(value) if place in as_text else _number(value)
    if isinstance(value, bool) and place in as_text:
        return json.dumps(value)
    return value


READERS = {".txt": read_lines, ".csv": read_csv, ".jsonl": read_json, ".json": read_json}


# --- columns ---------------------------------------------------------------------------------------------


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
