"""GSM8K, with a stand-in for the Hub: its prompts, its rewards and whole runs."""

import re

import datasets
import pytest
from conftest import PROBLEMS, lines_of
from transformers import AutoTokenizer

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.rewards.verifiable import final_number, marked_answer, numeric_answer
from grpo_lab.tasks.gsm8k import MARK_THE_ANSWER, check_numbers, gsm8k
from grpo_lab.tasks.registry import find_task


def test_gsm8k_is_two_hub_splits_as_chats_with_test_problems_in_an_order_drawn_by_the_seed(hub):
    training, held_out = gsm8k(seed=0)
    assert sorted((w["path"], w["name"], w["split"]) for w in hub) == [
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "main", "train"),
    ]
    assert (len(training), len(held_out)) == (12, 15)
    system, user = training[1]["prompt"]
    assert system == {"role": "system", "content": MARK_THE_ANSWER}
    assert user == {"role": "user", "content": f"{PROBLEMS[1][0]} (0)"}

    def order(seed):
        rows = gsm8k(seed=seed)[1]
        return [rows[i]["prompt"][1]["content"] for i in range(len(rows))]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


@pytest.mark.parametrize(("question", "answer", "number"), PROBLEMS)
def test_the_answer_of_gsm8k_is_the_number_after_the_mark(question, answer, number):
    assert final_number(answer) == number
    completions = [f"So\n#### {number:,}", f"It is {number}.", f"#### {number + 1}\n{number}", "#### "]
    assert numeric_answer([question] * 4, completions, answer=[answer] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert marked_answer([question] * 4, completions) == [1.0, 0.0, 0.0, 0.0]


def test_the_system_prompt_asks_for_the_format_that_marked_answer_rewards():
    example = MARK_THE_ANSWER.splitlines()[-1]
    assert marked_answer(["?"], [f"6 * 7 = 42\n{example}"]) == numeric_answer(["?"], [example], answer=[42]) == [1.0]


def test_evaluations_before_during_and_after_the_run_count_only_the_first_reward(train, problems, tmp_path):
    # the tiny model never answers correctly, so these rewards stand in for a model that is right in one of three
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, answer):\n"
        "    return [float('Natalia' in p[-1]['content']) for p in prompts]\n"
        "def form(prompts, completions, answer):\n    return [1.0 for c in completions]\n"
    )
    mine = [f"{tmp_path / 'mine.py'}:{name}" for name in ("right", "form")]
    arguments = ["--preset", "gsm8k", "--dataset", problems, "--eval-dataset", problems, "--max-eval-samples", "3"]
    rewards = ["--reward", mine[0], "--reward", mine[1], "--reward-weights", "1", "0.2"]
    status, out, complaint = train(*arguments, *rewards)
    assert (status, complaint) == (0, "")
    words = r"right, {}: 33\.3%   \(95 %: 6\.1% to 79\.2%\)"  # one of three, by Wilson
    for label in ("sampled", "greedy", "at least one of 2"):
        assert len(re.findall(words.format(label), out)) == 4  # before, after each of two steps, after
    assert out.count("on prompts kept for evaluation") == 2
    assert (
        out.index("Before training") < out.index("After step 1,") < out.index("After step 2,") < out.index("After tr")
    )
    rows = lines_of(tmp_path / "out/metrics.jsonl")
    assert [row["eval/pass@1"] for row in rows] == [1 / 3, 1 / 3]
    assert [row["eval/reward"] for row in rows] == pytest.approx([1 / 3 + 0.2] * 2)


def test_the_preset_trains_on_gsm8k_with_its_two_rewards(train, hub, tmp_path):
    status, out, complaint = train("--preset", "gsm8k")
    assert (status, complaint) == (0, "")
    assert "Settings: preset gsm8k; changed: " in out
    assert "12 prompts · 2 optimizer steps of 2 prompts × 2 completions" in out
    assert "on 15 prompts kept for evaluation" in out
    row = lines_of(tmp_path / "out/completions.jsonl")[0]
    assert set(row["rewards"]) == {"numeric_answer", "marked_answer"}
    assert row["reward"] == pytest.approx(row["rewards"]["numeric_answer"] + 0.2 * row["rewards"]["marked_answer"])
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_the_last_evaluation_is_made_once(train, problems, monkeypatch):
    evaluations, evaluate = [], GRPOTrainer.evaluate

    def counted(self, *arguments, **settings):
        evaluations.append(self.step)
        return evaluate(self, *arguments, **settings)

    monkeypatch.setattr(GRPOTrainer, "evaluate", counted)
    assert train("--preset", "gsm8k", "--dataset", problems, "--eval-dataset", problems)[0] == 0
    assert evaluations == [0, 1, 2]


def test_the_task_works_from_python(hub, chat_model, tmp_path):
    from transformers import AutoModelForCausalLM

    task = find_task("gsm8k")
    training, held_out = task.data(0)
    quick = {"max_new_tokens": 4, "max_steps": 1, "warmup_steps": 0, "output_dir": str(tmp_path / "out")}
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(chat_model), None, list(task.rewards),
        AutoTokenizer.from_pretrained(chat_model), GRPOConfig.preset("gsm8k", **quick), training,
        held_out.select([0, 1]),
    )  # fmt: skip
    assert "eval/pass@8_high" in trainer.train()[-1]


def test_the_first_answer_without_a_number_is_named():
    check_numbers(SimplePromptDataset(["a", "b"], answer=["#### 1", 2.5]), "mine")
    with pytest.raises(
        ValueError, match=r"^mine: answer 1 has no number: 'x{60}'\. For texts there is --reward exact_ans"
    ):
        check_numbers(SimplePromptDataset(["a", "b"], answer=["1", "x" * 99]), "mine")


def test_without_the_hub_the_error_names_the_file_flags(train, monkeypatch):
    def no_network(**_):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    status, _, complaint = train("--preset", "gsm8k")
    assert status == 2
    assert "could not read the dataset openai/gsm8k:main: Couldn't reach" in complaint
    assert "give files: --dataset FILE --eval-dataset FILE" in complaint
