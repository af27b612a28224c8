"""Prompts from files and the Hub: what is loaded, and the errors about bad files."""

import csv

import datasets
import pytest
from conftest import CHAT

from grpo_lab.tasks.files import load_prompts, with_prompt_column


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that writes a file and returns its name; datasets' cache goes to the same folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "2+2=\n\n  \nwas ist ½?\n"),  # empty lines are no prompts
        ("p.txt", "\ufeff2+2=\r\nwas ist ½?\r\n"),  # as Windows writes it
        ("p.jsonl", '{"prompt": "2+2=", "answer": 4}\n{"prompt": "was ist ½?", "answer": null}\n'),
        ("p.json", '[{"prompt": "2+2=", "answer": 4}, {"prompt": "was ist ½?", "answer": null}]'),
        ("p.csv", "prompt,answer\n2+2=,4\nwas ist ½?,\n"),
    ],
)
def test_files_of_every_format_are_loaded(file, name, content):
    dataset = load_prompts(file(name, content))
    assert list(dataset["prompt"]) == ["2+2=", "was ist ½?"]
    assert name == "p.txt" or list(dataset["answer"]) == (["4", None] if name == "p.csv" else [4, None])


def test_parquet_and_chats_are_loaded(file, tmp_path):
    datasets.Dataset.from_dict({"prompt": [CHAT], "answer": ["4"]}).to_parquet(tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet"))[0] == {"prompt": CHAT, "answer": "4"}


def test_the_prompts_may_be_in_another_column(file):
    name = file("p.jsonl", '{"question": "2+2=", "prompt": "ignored", "answer": "4"}\n')
    assert load_prompts(name, prompt_column="question")[0] == {"prompt": "2+2=", "answer": "4"}
    assert load_prompts(file("p.txt", "2+2=\n"), prompt_column="question")[0] == {"prompt": "2+2="}
    with pytest.raises(ValueError, match=r"p\.jsonl has no column 'task', only .*answer.*--prompt-column"):
        load_prompts(name, prompt_column="task")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.txt", "", "p.txt is empty: at least one prompt is needed"),
        ("p.jsonl", "", "p.jsonl is empty: at least one prompt is needed"),
        ("p.txt", " \n\n", "p.txt is empty: at least one prompt is needed"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "could not read the dataset .*p.jsonl: line 2 is not JSON"),
        ("p.jsonl", "hello\n", "could not read the dataset .*p.jsonl: line 1 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\nnull\n', 'p.jsonl: row 1 must be an object such as {"prompt": .*got null'),
        ("p.json", '[{"prompt": "a"},\n3', "p.json: .*line 2 column 2"),
        ("p.json", '{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}", "p.json: .*(recursion|nested)"),
        ("p.csv", "prompt\none, two, three\n", 'more fields than the header. Write a prompt with commas "in quotes"'),
        ("p.txt", "caf\xe9\n".encode("latin-1"), "p.txt: 'utf-8' codec .*Save it as UTF-8"),
        ("p.parquet", "hello", "could not read the dataset .*p.parquet: Parquet"),
        ("p.jsonl", '{"question": "a"}\n', "p.jsonl has no column 'prompt', only question. Name the right one"),
        ("p.csv", "prompt,answer\na,1\n,2\n", "p.csv: prompt 1 must be a string .*got None"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 22}\n', "p.jsonl: prompt 1 must be a string .*got 22"),
        (
            "p.jsonl",
            '{"prompt": "a", "x": [1]}\n{"prompt": "a", "x": 1}',
            "p.jsonl: the column 'x' mixes types: .*list",
        ),
        ("p.jsonl", '{"prompt": "a", "x": NaN}', "p.jsonl: NaN is not a JSON number"),
        ("p.csv", 'prompt\n"a\n', "p.csv: unexpected end of data"),
        ("p.csv", "prompt,prompt\na,b\n", "p.csv: two columns have the name 'prompt'"),
        ("p.jsonl", '{"prompt": " "}\n', "p.jsonl: prompt 0 is empty"),
        ("p.csv", "prompt,answer\n", "p.csv is empty: at least one prompt is needed"),
        ("P.JSONL", "", "P.JSONL is empty: at least one prompt is needed"),
    ],
)
def test_a_bad_file_is_named_with_its_problem_in_one_sentence(file, name, content, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        load_prompts(file(name, content))
    assert "\n" not in str(caught.value)


LARGE = "123456789012345678901234567890"


@pytest.mark.parametrize(
    ("name", "content", "answers"),
    [
        ("p.csv", "prompt,answer\na,5\nb,2.5\n", ["5", "2.5"]),
        ("p.csv", "prompt,answer\na,007\n", ["007"]),
        ("p.csv", "prompt,answer\na,2.50\nb,0.00001\n", ["2.50", "0.00001"]),
        ("p.csv", "prompt,answer\na,None\nb,NA\nc,null\nd,nan\ne,True\n", ["None", "NA", "null", "nan", "True"]),
        ("p.csv", f"prompt,answer\na,{LARGE}\nb,2024-01-01\n", [LARGE, "2024-01-01"]),
        ("p.csv", 'prompt,answer\r\na,"x, ""y""\nz"\r\n', ['x, "y"\nz']),
        ("p.jsonl", '{"prompt": "a", "answer": 5}\n{"prompt": "b", "answer": 2.5}\n', ["5", "2.5"]),
        ("p.jsonl", '{"prompt": "a", "answer": 5}\n{"prompt": "b", "answer": "five"}\n', ["5", "five"]),
        ("p.jsonl", '{"prompt": "a", "answer": 5}\n{"prompt": "b", "answer": 6}\n', [5, 6]),
        ("p.jsonl", '{"prompt": "a", "answer": 2.5}\n{"prompt": "b", "answer": 0.1}\n', [2.5, 0.1]),
        ("p.jsonl", '{"prompt": "a", "answer": 2.50}\n', ["2.50"]),
        ("p.jsonl", '{"prompt": "a", "answer": 0.00001}\n', ["0.00001"]),
        ("p.json", '[{"prompt": "a", "answer": 12345678901234567}, {"prompt": "a", "answer": 2.5}]',
         ["12345678901234567", "2.5"]),
        ("p.jsonl", f'{{"prompt": "a", "answer": {LARGE}}}\n', [LARGE]),
        ("p.jsonl", f'{{"prompt": "a", "answer": {"9" * 5000}}}\n', ["9" * 5000]),
        ("p.jsonl", '{"prompt": "a", "answer": 1e999}\n', ["1e999"]),
        ("p.jsonl", '{"prompt": "a", "answer": "2024-01-01"}\n', ["2024-01-01"]),
        ("p.json", '[{"prompt": "a", "answer": true}, {"prompt": "a", "answer": 1}]', ["true", "1"]),
        ("p.json", '[{"prompt": "a", "answer": [5, 2.5, null]}]', [["5", "2.5", None]]),
        ("p.json", '[{"prompt": "a", "answer": [5, 2]}]', [[5, 2]]),
        ("p.json", '[{"prompt": "a", "answer": {"x": 1, "y": 2}}, {"prompt": "a", "answer": {"x": 1.5, "y": 2}}]',
         [{"x": "1", "y": 2}, {"x": "1.5", "y": 2}]),
    ],
)  # fmt: skip
def test_what_a_file_says_stays_as_it_says_it(file, name, content, answers):
    dataset = load_prompts(file(name, content), answer_column="answer")
    found = list(dataset["answer"])
    assert found == answers
    assert [type(value) for value in found] == [type(value) for value in answers]


@pytest.mark.parametrize(
    ("name", "content"), [("p.jsonl", '{"prompt": "2024-01-01"}'), ("p.csv", "prompt\n2024-01-01\n")]
)
def test_a_prompt_that_looks_like_a_date_or_a_number_is_a_text(file, name, content):
    assert list(load_prompts(file(name, content))["prompt"]) == ["2024-01-01"]
    assert list(load_prompts(file(name, content.replace("2024-01-01", "22")))["prompt"]) == ["22"]


def test_a_long_cell_is_read_and_the_limit_of_other_readers_stays(file):
    limit = csv.field_size_limit()
    assert load_prompts(file("p.csv", "prompt\n" + "x" * 200_000))[0] == {"prompt": "x" * 200_000}
    assert csv.field_size_limit() == limit


def test_a_missing_file_is_not_searched_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=r"there is no file nowhere/p\.jsonl\."):
        load_prompts("nowhere/p.jsonl")


@pytest.mark.parametrize(("name", "config"), [("owner/name", None), ("owner/name:main", "main")])
def test_other_names_are_loaded_from_the_hub(monkeypatch, name, config):
    asked = {}

    def load_dataset(**where):
        asked.update(where)
        return datasets.Dataset.from_dict({"prompt": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_prompts(name, split="test")) == 1
    assert asked == {"path": "owner/name", "name": config, "split": "test"}


def test_a_dataset_without_rows_is_refused():
    with pytest.raises(ValueError, match="the dataset is empty"):
        with_prompt_column(datasets.Dataset.from_dict({"prompt": []}), "prompt")
