"""Prompts: datasets of texts and chats, chat templates, token ids."""

import datasets
import pytest
from conftest import CHAT, TEMPLATE, starting_tokenizer

from grpo_lab.rollout.prompts import SimplePromptDataset, as_chats, chat_text, checked_dataset, encode_prompt

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
def test_what_is_no_dataset_is_refused_with_the_cure(prompts, columns, error, message):
    with pytest.raises(error, match=message):
        SimplePromptDataset(prompts, **columns)


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
    with pytest.raises(ValueError, match="gives no tokens for the prompt ''"):
        encode_prompt(tokenizer, "")


MESSAGES = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize("template", [MESSAGES, REFUSES + MESSAGES], ids=["drops it", "refuses it"])
def test_what_a_template_without_a_system_turn_would_lose_begins_the_users_turn(tokenizer, template):
    tokenizer.chat_template = template
    chat = as_chats(SimplePromptDataset(["2+2="]), "Be brief. ")[0]["prompt"]
    assert chat_text(tokenizer, chat) == "<user>Be brief.\n\n2+2="
    answered = [*chat, {"role": "assistant", "content": "4"}]
    assert chat_text(tokenizer, answered) == "<user>Be brief.\n\n2+2=<assistant>4"
    assert encode_prompt(tokenizer, chat) == tokenizer("<user>Be brief.\n\n2+2=")["input_ids"]
    assert chat_text(tokenizer, chat[1:]) == "<user>2+2="


def test_a_system_turn_that_the_template_writes_stays_where_it_is(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    chat = as_chats(SimplePromptDataset(["2+2="]), " Be brief. ")[0]["prompt"]
    assert chat_text(tokenizer, chat) == "<system>Be brief.<user>2+2="


def test_a_chat_that_its_template_refuses_is_said(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    for chat in (CHAT, as_chats(SimplePromptDataset(["2+2="]), "Be brief.")[0]["prompt"]):
        with pytest.raises(ValueError, match="chat template rejects a prompt: roles must alternate"):
            encode_prompt(tokenizer, chat)


def test_a_dataset_of_several_splits_or_without_a_length_is_none():
    rows = datasets.Dataset.from_dict({"prompt": ["2+2="]})
    with pytest.raises(TypeError, match=r"train_dataset must be .*, got DatasetDict: take one split of it"):
        checked_dataset(datasets.DatasetDict(train=rows), "train_dataset")
    with pytest.raises(TypeError, match=r"train_dataset must be .*, got IterableDataset"):
        checked_dataset(rows.to_iterable_dataset(), "train_dataset")
