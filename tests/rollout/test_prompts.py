"""Prompts: datasets of texts and chats, chat templates, token ids."""

import datasets
import pytest
from conftest import CHAT, TEMPLATE, starting_tokenizer
from tokenizers import processors

from grpo_lab.rollout.prompts import (
    SimplePromptDataset,
    as_chats,
    chat_text,
    checked_dataset,
    encode_prompt,
    encode_prompts,
    longest_prompts,
    prompt_column,
)
from grpo_lab.tasks.pocket.make import make_tokenizer

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
        (["a", "2+\ud800="], {}, ValueError, r"prompt 1 has half a character, '\\ud800' at 2: a lone surrogate"),
        ([[*CHAT, {"role": "user", "content": "\udfff"}]], {}, ValueError, "prompt 0 has half a character"),
        ([[{"role": "\udfff", "content": "a"}]], {}, ValueError, "prompt 0 has half a character"),
        ([[{"role": None, "content": "a"}]], {}, TypeError, "prompt 0 must be a string"),
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


def surrounded(single: str, **named):
    """The pocket model's tokenizer, which puts special tokens around a text: <eos> (1) and those given."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(named)
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", *named.values())}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=list(special.items())
    )
    return tokenizer


@pytest.mark.parametrize(
    ("single", "named", "before", "after"),
    [
        ("$A <eos>", {}, "", ""),
        ("<eos> $A <eos>", {}, "<eos>", ""),  # GPT-2's begin and end token are one
        ("<eos> $A <s>", {"bos_token": "<s>"}, "<eos>", "<s>"),  # ChatGLM begins to write behind its first token
        ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, "[CLS]", ""),
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, "<s>", ""),
        ("<s> $A </s> </s>", {"bos_token": "<s>", "eos_token": "</s>"}, "<s>", ""),
    ],
)
def test_no_end_token_stands_before_a_completion(single, named, before, after):
    tokenizer = surrounded(single, **named)
    prompts = ["2+2=", "2+2=<eos>", "3"]  # one ends with such a token itself: it stays
    wanted = [tokenizer(before + prompt + after, add_special_tokens=False)["input_ids"] for prompt in prompts]
    assert encode_prompts(tokenizer, prompts) == wanted
    assert [encode_prompt(tokenizer, prompt) for prompt in prompts] == wanted


def test_a_text_that_has_its_first_token_already_gets_no_second_one():
    tokenizer = starting_tokenizer(TEMPLATE)
    start = tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "<eos>2+2=") == encode_prompt(tokenizer, "2+2=")
    assert encode_prompts(tokenizer, ["<eos>2", "2", "<eos><eos>2"]) == [
        [start, *tokenizer("2", add_special_tokens=False)["input_ids"]]
    ] * 2 + [[start, start, *tokenizer("2", add_special_tokens=False)["input_ids"]]]


def test_a_batch_of_texts_and_chats_equals_its_prompts_one_by_one():
    tokenizer = starting_tokenizer(TEMPLATE)
    prompts = ["2+2=", CHAT, "<eos>1", "3+4", [*CHAT, {"role": "assistant", "content": "4"}]]
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]
    assert encode_prompts(tokenizer, []) == []


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ CONTENT }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("written", ["m.content", "m.content | trim"])
@pytest.mark.parametrize("words", ["Let me think.\n<think>", "4", "2+2=?"])
def test_a_chat_that_ends_with_the_assistants_words_is_continued(tokenizer, written, words):
    tokenizer.chat_template = CHATML.replace("CONTENT", written)
    chat = [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": words}]
    assert chat_text(tokenizer, chat, for_completion=True) == f"<|user|>2+2=?<|end|>\n<|assistant|>{words}"
    with_system = [{"role": "system", "content": "Be brief."}, *chat]
    text = chat_text(tokenizer, with_system, for_completion=True)
    assert text == f"<|system|>Be brief.<|end|>\n<|user|>2+2=?<|end|>\n<|assistant|>{words}"
    # a finished chat is closed, and one that ends with the user gets the assistant's turn opened
    assert chat_text(tokenizer, chat) == f"<|user|>2+2=?<|end|>\n<|assistant|>{words}<|end|>\n"
    assert chat_text(tokenizer, chat[:1], for_completion=True) == "<|user|>2+2=?<|end|>\n<|assistant|>"


@pytest.mark.parametrize(
    ("written", "words"),
    [("m.content | upper", "four"), ("m.content.split('</think>')[-1]", "<think>2</think>4"), ("m.content", " ")],
)
def test_words_that_the_template_changes_cannot_be_continued(tokenizer, written, words):
    tokenizer.chat_template = CHATML.replace("CONTENT", written)
    chat = [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": words}]
    with pytest.raises(ValueError, match=r"a prompt ends with the assistant's words .* Leave that message out"):
        encode_prompt(tokenizer, chat)


@pytest.mark.parametrize(
    ("written", "system"),
    [
        ("m.content | replace('\n', ' ')", "Be brief.\nBe right."),
        ("m.content.split() | join(' ')", "Be  brief."),
        ("m.content | tojson", 'Say "yes".'),
        ("m.content | indent(2)", "Be brief.\nBe right."),
        ("m.content | upper", "Be brief."),
    ],
)
def test_a_system_text_that_the_template_writes_in_its_own_way_stays_in_its_turn(tokenizer, written, system):
    tokenizer.chat_template = CHATML.replace("CONTENT", written)
    chat = as_chats(SimplePromptDataset(["2+2="]), system)[0]["prompt"]
    assert chat_text(tokenizer, chat) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert chat_text(tokenizer, chat).startswith("<|system|>")


def test_a_system_text_that_is_dropped_is_not_taken_for_the_users(tokenizer):
    tokenizer.chat_template = MESSAGES
    chat = [{"role": "system", "content": "2"}, *CHAT]  # the user's turn has a 2 of its own
    assert chat_text(tokenizer, chat) == "<user>2\n\n2+2="


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


def test_the_prompts_of_any_dataset_are_read():
    rows = [{"prompt": "2+2="}, {"prompt": "3"}]
    for dataset in (SimplePromptDataset(["2+2=", "3"]), datasets.Dataset.from_list(rows), rows):
        assert list(prompt_column(checked_dataset(dataset, "train_dataset"))) == ["2+2=", "3"]


def test_the_longest_prompts_are_those_of_most_bytes():
    chat = [{"role": "user", "content": "a" * 8}, {"role": "user", "content": "a" * 8}]
    assert longest_prompts(SimplePromptDataset(["a" * 14, "五五五五五", "a", chat]), 3) == [
        "a" * 14,
        "五五五五五",
        chat,
    ]
