"""Prompts in every form; each is used once per epoch, in an order that can be saved."""

import re
import zlib
from itertools import combinations_with_replacement, permutations, product

import datasets
import pytest
from conftest import CHAT, TEMPLATE, starting_tokenizer

from grpo_lab.rewards.verifiable import evaluate_expression, solves
from grpo_lab.rollout.prompts import SimplePromptDataset, as_chats, chat_text, checked_dataset, encode_prompt
from grpo_lab.tasks.countdown import countdown_dataset, countdown_expressions, countdown_problems
from grpo_lab.tasks.files import load_prompts, with_prompt_column
from grpo_lab.training.order import PromptOrder, derived_seed

# --- SimplePromptDataset --------------------------------------------------------------------------------


def test_a_row_holds_its_prompt_and_its_columns():
    dataset = SimplePromptDataset(("2+2=", CHAT, "4+4="), answer=(4, 4, 8), level=["easy", "easy", "hard"])
    assert len(dataset) == 3
    assert dataset[0] == {"prompt": "2+2=", "answer": 4, "level": "easy"}
    assert dataset[-1] == {"prompt": "4+4=", "answer": 8, "level": "hard"}
    assert [row["prompt"] for row in dataset] == ["2+2=", CHAT, "4+4="]
    some = dataset.select([2, 0])
    assert isinstance(some, SimplePromptDataset)
    assert [row["answer"] for row in some] == [8, 4]
    assert some.columns.keys() == {"prompt", "answer", "level"}


def test_a_column_of_a_datasets_dataset_will_do():
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
    assert SimplePromptDataset(rows["prompt"]).columns == {"prompt": ["a", "b"]}


@pytest.mark.parametrize(
    ("prompts", "columns", "error", "message"),
    [
        ("2+2=", {}, TypeError, r"got one string. One prompt\? Use \[prompt\]"),
        ([], {}, ValueError, "the dataset is empty: at least one prompt is needed"),
        (["a", " \n"], {}, ValueError, "prompt 1 is empty"),
        (["a", 7], {}, TypeError, r"prompt 1 must be a string or a list of \{\"role\": .*got 7"),
        ([None], {}, TypeError, "prompt 0 must be a string"),
        ([CHAT, []], {}, TypeError, "prompt 1 must be a string"),
        ([[{"role": "user"}]], {}, TypeError, "prompt 0 must be a string"),
        ([["2+2="]], {}, TypeError, "prompt 0 must be a string"),
        (["a", "b"], {"answer": [1]}, ValueError, "column 'answer' has 1 values for 2 prompts"),
        (["a"], {"prompt": ["b"]}, ValueError, "Rename the other column"),
    ],
)
def test_an_invalid_dataset_is_refused_with_the_cure(prompts, columns, error, message):
    with pytest.raises(error, match=message):
        SimplePromptDataset(prompts, **columns)


# --- files ----------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a file and return its name; the library's cache goes to the same folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "2+2=\n\n  \nwas ist ½?\n"),  # empty lines are skipped
        ("p.txt", "\ufeff2+2=\r\nwas ist ½?\r\n"),  # as Windows writes it
        ("p.jsonl", '{"prompt": "2+2=", "answer": 4}\n{"prompt": "was ist ½?", "answer": null}\n'),
        ("p.json", '[{"prompt": "2+2=", "answer": 4}, {"prompt": "was ist ½?", "answer": null}]'),
        ("p.csv", "prompt,answer\n2+2=,4\nwas ist ½?,\n"),
    ],
)
def test_files_of_every_kind_are_read(file, name, content):
    dataset = load_prompts(file(name, content))
    assert list(dataset["prompt"]) == ["2+2=", "was ist ½?"]
    assert name == "p.txt" or list(dataset["answer"]) == [4, None]


def test_parquet_and_chats_are_read(file, tmp_path):
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
        ("p.csv", "prompt,answer\n22,1\n", "p.csv: prompt 0 must be a string .*got 22"),
        ("p.jsonl", '{"prompt": " "}\n', "p.jsonl: prompt 0 is empty"),
        ("p.csv", "prompt,answer\n", "p.csv is empty: at least one prompt is needed"),
        ("P.JSONL", "", "P.JSONL is empty: at least one prompt is needed"),
    ],
)
def test_a_bad_file_is_named_with_its_problem_in_one_sentence(file, name, content, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        load_prompts(file(name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch):
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


# --- encode_prompt --------------------------------------------------------------------------------------


def test_a_text_gets_the_special_tokens_of_its_tokenizer_and_a_chat_those_of_the_template():
    tokenizer = starting_tokenizer(TEMPLATE)
    start, two, plus, equals, colon = tokenizer.convert_tokens_to_ids(["<eos>", "2", "+", "=", ":"])
    assert encode_prompt(tokenizer, "2+2=") == [start, two, plus, two, equals]
    # the template opens the assistant's turn with "="; <eos> is there once, not twice
    assert encode_prompt(tokenizer, CHAT) == [start, two, plus, two, equals, colon, equals]


def test_a_chat_needs_a_template_and_a_prompt_at_least_one_token(tokenizer):
    with pytest.raises(ValueError, match=r"no chat template\. Use text prompts, or the tokenizer of an instruct model"):
        encode_prompt(tokenizer, CHAT)
    with pytest.raises(ValueError, match="no tokens for the prompt ''"):
        encode_prompt(tokenizer, "")


# --- PromptOrder ----------------------------------------------------------------------------------------


def batches(order, number):
    return [next(order) for _ in range(number)]


@pytest.mark.parametrize(("size", "batch_size", "lengths"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 5, [3])])
def test_every_prompt_comes_once_per_epoch(size, batch_size, lengths):
    order, seen = PromptOrder(size, batch_size, seed=0), []
    assert order.batches_per_epoch == len(lengths)
    for epoch in range(5):
        some = batches(order, len(lengths))
        assert order.state_dict() == {"epoch": epoch, "cursor": size}
        assert [len(b) for b in some] == lengths  # the last one may be smaller: nothing is dropped
        seen.append([i for batch in some for i in batch])
        assert sorted(seen[-1]) == list(range(size))
    assert size == 3 or len({tuple(s) for s in seen}) == 5  # a new order each time


def test_the_seed_decides_the_order():
    first, again, other = (batches(PromptOrder(50, 7, seed), 20) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("taken", range(8))
def test_a_saved_order_continues_exactly_where_it_stopped(taken):
    order = PromptOrder(10, 4, seed=3)  # 3 batches an epoch: saved at its start, in its middle and at its end
    batches(order, taken)
    restored = PromptOrder(10, 4, seed=3)
    restored.load_state_dict(order.state_dict())
    assert batches(restored, 9) == batches(order, 9)
    assert restored.state_dict() == order.state_dict()


def test_derived_seeds_differ_for_each_seed_purpose_and_number():
    # pinned: recorded runs depend on it
    assert derived_seed(0, "epoch", 1) == zlib.crc32(b"0/epoch/1") == 221630651
    grid = list(product((0, 1, 11, 2**40), ("epoch", "rollout", "evaluate"), (0, 1, 11, 111)))
    assert len({derived_seed(*one) for one in grid}) == len(grid)


# --- Countdown ------------------------------------------------------------------------------------------

NUMBERS = pytest.mark.parametrize("numbers", [3, 4])
FORMS = {
    3: ("{}+{}+{}", "{}+{}-{}", "{}*{}+{}", "{}*{}*{}"),
    4: ("{}+{}+{}+{}", "{}+{}+{}-{}", "{}*{}+{}+{}", "{}*{}+{}-{}", "{}*{}+{}*{}", "{}*{}-{}*{}"),
}


def all_numbers(numbers):
    return list(combinations_with_replacement(range(2, 10), numbers))


def problem(prompt):
    numbers, target = prompt.rstrip("=").split(":")
    return tuple(sorted(map(int, numbers.split(",")))), int(target)


@pytest.mark.parametrize("numbers", all_numbers(3)[::5] + all_numbers(4)[::15], ids=str)
def test_every_expression_has_its_value_and_uses_each_number_once(numbers):
    found = countdown_expressions(numbers)
    for value, expressions in found.items():
        assert all(evaluate_expression(text) == (value, list(numbers)) for text in expressions)
    texts = [text for expressions in found.values() for text in expressions]
    for text in texts:  # tidy: what commutes is written once, the larger number first
        signs, terms = ["+", *re.findall("[+-]", text)], [term.split("*") for term in re.split("[+-]", text)]
        assert all(term == sorted(term, reverse=True) for term in terms)
        added = [(len(term), term) for sign, term in zip(signs, terms, strict=True) if sign == "+"]
        assert added == sorted(added, reverse=True)
    assert len(set(texts)) == len(texts)
    orders = set(permutations(numbers))
    values = {evaluate_expression(form.format(*order))[0] for form in FORMS[len(numbers)] for order in orders}
    assert found.keys() == values  # no value of the forms is missed
    shapes = {re.sub(r"\d", "{}", text) for text in texts}
    assert shapes == set(FORMS[len(numbers)])


@NUMBERS
def test_every_prompt_can_be_solved(numbers):
    for split in ("train", "held-out"):
        for prompt in countdown_dataset(200, numbers=numbers, split=split).columns["prompt"]:
            chosen, target = problem(prompt)
            assert len(chosen) == numbers
            assert 0 <= target <= 99
            assert solves(prompt, countdown_expressions(chosen)[target][0])


@NUMBERS
def test_held_out_problems_never_occur_in_training(numbers):
    problems = {split: set(countdown_problems(split, numbers)) for split in ("train", "held-out")}
    everything = {(n, t) for n in all_numbers(numbers) for t in countdown_expressions(n) if 0 <= t <= 99}
    assert problems["train"] | problems["held-out"] == everything
    assert not problems["train"] & problems["held-out"]
    assert 0.12 < len(problems["held-out"]) / len(everything) < 0.22
    for split, seed in product(problems, range(3)):
        prompts = countdown_dataset(300, numbers=numbers, split=split, seed=seed).columns["prompt"]
        assert {problem(p) for p in prompts} <= problems[split]


def test_countdown_prompts_are_all_different_and_drawn_by_the_seed():
    prompts = countdown_dataset(500, seed=7).columns["prompt"]
    assert len(set(prompts)) == 500
    assert prompts == countdown_dataset(500, seed=7).columns["prompt"]
    assert prompts != countdown_dataset(500, seed=8).columns["prompt"]
    rising = [numbers == sorted(numbers) for numbers in (p.split(":")[0].split(",") for p in prompts)]
    assert sum(rising) < 200  # one order in six rises, where the three numbers differ


def test_countdown_says_what_it_does_not_have():
    with pytest.raises(ValueError, match='"train" or "held-out", got \'test\''):
        countdown_dataset(1, split="test")
    with pytest.raises(ValueError, match=r"only \d+ Countdown prompts in the split 'held-out', 100000 were asked for"):
        countdown_dataset(100_000, split="held-out")
    with pytest.raises(ValueError, match="Countdown has 3 or 4 numbers here, got 5"):
        countdown_dataset(1, numbers=5)


MESSAGES = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize("template", [MESSAGES, REFUSES + MESSAGES], ids=["drops it", "refuses it"])
def test_a_system_message_that_the_template_drops_is_put_before_the_user_message(tokenizer, template):
    tokenizer.chat_template = template
    chat = as_chats(SimplePromptDataset(["2+2="]), "Be brief. ")[0]["prompt"]
    assert chat_text(tokenizer, chat) == "<user>Be brief.\n\n2+2="
    answered = [*chat, {"role": "assistant", "content": "4"}]
    assert chat_text(tokenizer, answered) == "<user>Be brief.\n\n2+2=<assistant>4"
    assert encode_prompt(tokenizer, chat) == tokenizer("<user>Be brief.\n\n2+2=")["input_ids"]
    assert chat_text(tokenizer, chat[1:]) == "<user>2+2="


def test_a_system_message_that_the_template_writes_is_not_moved(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    chat = as_chats(SimplePromptDataset(["2+2="]), " Be brief. ")[0]["prompt"]
    assert chat_text(tokenizer, chat) == "<system>Be brief.<user>2+2="


def test_a_chat_that_its_template_rejects_is_an_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    for chat in (CHAT, as_chats(SimplePromptDataset(["2+2="]), "Be brief.")[0]["prompt"]):
        with pytest.raises(ValueError, match="chat template rejects a prompt: roles must alternate"):
            encode_prompt(tokenizer, chat)


def test_a_dataset_with_several_splits_or_without_a_length_is_refused():
    rows = datasets.Dataset.from_dict({"prompt": ["2+2="]})
    with pytest.raises(TypeError, match=r"train_dataset must be .*, got DatasetDict: take one split of it"):
        checked_dataset(datasets.DatasetDict(train=rows), "train_dataset")
    with pytest.raises(TypeError, match=r"train_dataset must be .*, got IterableDataset"):
        checked_dataset(rows.to_iterable_dataset(), "train_dataset")
