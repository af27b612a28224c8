"""Which task, data and settings a command chooses, and the errors about them."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
from conftest import lines_of, parse_train

from grpo_lab import GRPOConfig, SimplePromptDataset
from grpo_lab.cli import main as cli
from grpo_lab.cli import parser
from grpo_lab.cli import train as train_command
from grpo_lab.cli.loading import choose_model, load_data
from grpo_lab.rewards.verifiable import countdown, numeric_answer
from grpo_lab.rollout import prompts
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.tasks.gsm8k import MARK_THE_ANSWER, gsm8k
from grpo_lab.tasks.registry import TASKS
from grpo_lab.tasks.task import QWEN
from grpo_lab.training.config import PRESETS


def load(options, task, rewards, seed):
    """Load the data that the flags name."""
    return load_data(task, rewards, seed, **{name: getattr(options, name) for name in train_command.DATA_FLAGS})


@pytest.mark.parametrize(
    ("arguments", "task", "model", "settings"),
    [
        ([], "pocket", "pocket", "pocket"),
        (["--model-name", "pocket"], "pocket", "pocket", "pocket"),
        (["--preset", "pocket", "--model-name", "some/model"], "pocket", "some/model", "pocket"),
        (["--dataset", "x.txt"], None, "pocket", "pocket"),
        (["--model-name", "some/model"], None, "some/model", "grpo"),
        (["--preset", "gsm8k"], "gsm8k", QWEN, "gsm8k"),
        (["--task", "gsm8k"], "gsm8k", QWEN, "gsm8k"),
        (["--task", "gsm8k", "--preset", "gsm8k"], "gsm8k", QWEN, "gsm8k"),
        (["--task", "gsm8k", "--model-name", "some/model"], "gsm8k", "some/model", "gsm8k"),
        (["--preset", "gsm8k", "--dataset", "x.jsonl"], "gsm8k", QWEN, "gsm8k"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_chooses_task_model_and_settings(arguments, task, model, settings):
    options = parse_train(*arguments)
    assert parser.task_from(options) is (TASKS[task] if task else None)
    assert choose_model(options.model_name, parser.task_from(options)) == model
    assert parser.config_from(options)[0] == GRPOConfig.preset(settings)


def test_a_preset_overrides_the_task_and_flags_override_both():
    config, source = parser.config_from(parse_train("--task", "gsm8k", "--preset", "dr_grpo", "--kl-coef", "0.5"))
    assert config == GRPOConfig(**PRESETS["gsm8k"] | PRESETS["dr_grpo"] | {"kl_coef": 0.5})
    assert source == "preset gsm8k + preset dr_grpo; changed: kl_coef=0.5"


def test_reward_weights_of_a_task_apply_to_its_own_rewards_only():
    assert len(PRESETS["gsm8k"]["reward_weights"]) == len(TASKS["gsm8k"].rewards)
    assert parser.config_from(parse_train("--preset", "gsm8k", "--reward", "exact_answer"))[0].reward_weights is None
    assert parser.config_from(parse_train("--task", "pocket", "--preset", "gsm8k"))[0].reward_weights is None
    given = parse_train("--preset", "gsm8k", "--reward", "exact_answer", "--reward-weights", "3")
    assert parser.config_from(given)[0].reward_weights == (3.0,)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_source_in_help_and_a_preset(name, capsys):
    task = TASKS[name]
    assert task.preset in PRESETS
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert task.source in " ".join(capsys.readouterr().out.split())


def test_the_pocket_task_is_the_default_run():
    task = TASKS["pocket"]
    training, held_out = task.data(3)
    assert (len(training), len(held_out), task.rewards) == (2048, 400, (countdown,))
    assert training[0] == countdown_dataset(2048, seed=3)[0]
    assert not set(training.columns["prompt"]) & set(held_out.columns["prompt"])


def test_a_file_with_prompts_and_answers_trains(train, tmp_path):
    file = tmp_path / "sums.csv"
    file.write_text("sum,result,answer\n1+1=,2,wrong\n2+2=,4,wrong\n")
    columns = ["--prompt-column", "sum", "--answer-column", "result"]
    arguments = ["--dataset", str(file), "--eval-dataset", str(file), *columns]
    status, out, complaint = train(*arguments, "--reward", "numeric_answer", "--system-prompt", "Be brief.")
    assert (status, complaint) == (0, "")
    assert "on 2 prompts kept for evaluation" in out
    row = lines_of(tmp_path / "out/completions.jsonl")[0]
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
    options = Namespace(**vars(parse_train(*arguments)) | {"eval_dataset": None})
    read, _ = load(options, None, [numeric_answer], 0)
    assert list(read["answer"]) == ["2", "4"]


def test_a_system_prompt_replaces_an_existing_one(hub):
    chats = prompts.as_chats(gsm8k()[0], "Be brief.")
    assert [m["role"] for m in chats[0]["prompt"]] == ["system", "user"]
    assert chats[0]["prompt"][0]["content"] == "Be brief."
    talk = [
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "?"},
    ]
    assert prompts.as_chats(SimplePromptDataset([talk], answer=["4"]), "Be brief.")[0] == {
        "prompt": [{"role": "system", "content": "Be brief."}, *talk],
        "answer": "4",
    }


def test_an_eval_dataset_from_the_hub_is_its_test_split(hub):
    options = parse_train("--task", "gsm8k", "--dataset", "a/b", "--eval-dataset", "c/d:e")
    training, held_out = load(options, TASKS["gsm8k"], [numeric_answer], 0)
    assert [(w["path"], w["name"], w["split"]) for w in hub] == [("a/b", None, "train"), ("c/d", "e", "test")]
    assert (len(training), len(held_out)) == (12, 15)
    assert training[0]["prompt"][0]["content"] == MARK_THE_ANSWER


def test_max_eval_samples_of_a_task_is_a_default_for_the_flag(hub, monkeypatch):
    def sizes(*arguments):
        return [len(rows) for rows in load(parse_train(*arguments), TASKS["gsm8k"], [numeric_answer], 0)]

    assert sizes("--max-train-samples", "5") == [5, 15]
    monkeypatch.setitem(TASKS, "gsm8k", replace(TASKS["gsm8k"], max_eval_samples=4))
    assert sizes() == [12, 4]
    assert sizes("--max-eval-samples", "7") == [12, 7]
    assert sizes("--max-eval-samples", "700") == [12, 15]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (
            [{}],
            ["--prompt-column", "ask"],
            "no column 'ask', only question, answer. Name the right one with --prompt-c",
        ),
        (
            [{}],
            ["--answer-column", "gold"],
            "no column 'gold', only prompt, answer. Name the right one with --answer-c",
        ),
        ([{}, {"answer": "seven"}], [], "answer 1 has no number: 'seven'"),
        ([{}, {"answer": " "}], [], "answer 1 is empty"),
        ([{}, {"answer": None}], ["--reward", "exact_answer"], "answer 1 is empty"),
        ([{"question": ""}], [], "prompt 0 is empty"),
        ([{"completions": 3}], [], "a column 'completions', the name of an argument of every reward function. Rename"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_refused(train, tmp_path, rows, arguments, message):
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(json.dumps({"question": "a", "answer": "#### 1"} | row) for row in rows))
    status, _, complaint = train("--preset", "gsm8k", "--dataset", str(file), "--eval-dataset", str(file), *arguments)
    assert status == 2
    assert message in complaint


@pytest.mark.parametrize("reward", ["numeric_answer", "exact_answer"])
def test_a_reward_that_needs_answers_refuses_a_dataset_without_them(train, tmp_path, reward):
    (tmp_path / "prompts.txt").write_text("1+1=")
    status, _, complaint = train("--dataset", str(tmp_path / "prompts.txt"), "--reward", reward)
    assert status == 2
    assert "has no column 'answer', only prompt. Name the right one with --answer-column" in complaint


def test_a_task_with_your_own_data_needs_an_eval_dataset(train, problems):
    status, _, complaint = train("--preset", "gsm8k", "--dataset", problems)
    assert status == 2
    assert "eval_steps is 1, but there is no eval_dataset to evaluate on (--eval-dataset)" in complaint


def test_answers_without_a_reward_to_compare_them_are_an_error(train, problems):
    status, _, complaint = train("--dataset", problems, "--prompt-column", "question", "--answer-column", "answer")
    assert status == 2
    assert "--answer-column needs a reward that compares with the answers: --reward numeric_answer" in complaint


def test_without_the_hub_the_error_about_the_model_asks_for_a_folder(train, problems, monkeypatch):
    from transformers import AutoTokenizer

    def no_network(*_, **__):
        raise OSError("We couldn't connect to the Hub\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", no_network)
    data = ["--dataset", problems, "--eval-dataset", problems]
    status, _, complaint = train("--preset", "gsm8k", *data, model="Qwen/Qwen2.5-0.5B-Instruct")
    assert status == 2
    assert "could not load the model Qwen/Qwen2.5-0.5B-Instruct (OSError: We couldn't connect to the Hub)" in complaint
    assert "Without a network, give a folder" in complaint


def test_a_tokenizer_without_a_chat_template_is_refused(train, problems, model_folder):
    status, _, complaint = train(
        "--task", "gsm8k", "--dataset", problems, "--eval-dataset", problems, model=model_folder
    )
    assert status == 2
    assert "the tokenizer has no chat template" in complaint


def test_an_unknown_task_is_refused_with_the_list_of_tasks(train):
    status, _, complaint = train("--task", "GSM8K")
    assert status == 2
    assert "there is no task 'GSM8K'. Tasks: pocket, countdown4, gsm8k, reasoning-gym:NAME." in complaint
