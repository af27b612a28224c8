"""Loading by name, without a command line."""

import pytest

from grpo_lab.cli.loading import choose_model, choose_task, load_data, load_model, load_reward, load_tokenizer
from grpo_lab.rewards.verifiable import BUILT_IN, numeric_answer
from grpo_lab.tasks.registry import TASKS


def test_without_any_name_it_is_the_pocket_task_and_its_model():
    task = choose_task()
    assert task is TASKS["pocket"]
    assert choose_model(None, task) == "pocket"
    assert sum(p.numel() for p in load_model("pocket").parameters()) < 1e6
    assert load_tokenizer("pocket").encode("3,5,7:22=")


@pytest.mark.parametrize("keywords", [{"model_name": "some/model"}, {"dataset": "prompts.txt"}], ids=str)
def test_a_model_or_a_dataset_alone_is_no_task(keywords):
    assert choose_task(**keywords) is None
    assert choose_task("gsm8k", **keywords) is choose_task(preset="gsm8k", **keywords) is TASKS["gsm8k"]


def test_a_task_without_a_model_names_the_command_that_makes_one():
    with pytest.raises(ValueError, match="run grpo-lab pretrain --output-dir FOLDER"):
        choose_model(None, TASKS["countdown4"])
    assert choose_model("mine", TASKS["countdown4"]) == "mine"


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "math_answer"])
def test_a_built_in_reward_is_found_by_its_name(name):
    assert load_reward(name) is BUILT_IN[name]


def test_data_are_the_tasks_or_a_files_and_as_many_as_asked_for(tmp_path):
    train, held_out = load_data(TASKS["pocket"], [], 0, max_train_samples=3, max_eval_samples=2)
    assert (len(train), len(held_out)) == (3, 2)
    file = tmp_path / "sums.csv"
    file.write_text("prompt,answer\n1+1=,2\n2+2=,4\n")
    train, held_out = load_data(None, [numeric_answer], 0, dataset=str(file), system_prompt="Be brief.")
    assert (len(train), held_out) == (2, None)
    assert train[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
