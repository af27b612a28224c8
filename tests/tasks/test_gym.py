"""Tasks of reasoning-gym: generated from the seed, scored by their own rule, trained."""

import pytest
from conftest import lines_of

from grpo_lab.tasks import gym
from grpo_lab.tasks.registry import find_task


@pytest.fixture
def few_problems(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(gym, "GYM_PROMPTS", 6)
    monkeypatch.setattr(gym, "GYM_HELD_OUT", 4)


def test_problems_are_generated_from_the_seed_and_scored_by_the_tasks_own_rule(few_problems):
    task = find_task("reasoning-gym:basic_arithmetic")
    training, held_out = task.data(5)
    assert (len(training), len(held_out)) == (6, 4)
    again, other = task.data(5)[0], task.data(6)[0]
    assert [training[i] for i in range(6)] == [again[i] for i in range(6)]
    assert not {str(other[i]["prompt"]) for i in range(6)} & {str(training[i]["prompt"]) for i in range(6)}
    for row in (training[5], held_out[0]):
        answers = [f"I think.\n#### {row['answer']}", row["answer"], "#### 1e9", ""]
        scores = task.rewards[0](["?"] * 4, answers, problem=[row["problem"]] * 4, answer=[row["answer"]] * 4)
        assert scores[:2] == [1.0, 1.0]
        assert max(scores[2:]) < 1


def test_no_held_out_problem_occurs_in_training(few_problems, monkeypatch):
    monkeypatch.setattr(gym, "GYM_PROMPTS", 60)
    training, held_out = find_task("reasoning-gym:leg_counting").data(0)
    some = find_task("reasoning-gym:coin_flip").data(0)  # few different problems: many occur twice
    for first, second in ((training, held_out), some):
        assert not set(map(str, first.columns["prompt"])) & set(map(str, second.columns["prompt"]))


def test_a_task_without_new_held_out_problems_is_an_error(few_problems, monkeypatch):
    import reasoning_gym

    one = [{"question": "2+2=", "answer": 4}]
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name, seed, size: one * size)
    with pytest.raises(ValueError, match="has too few problems: all held-out ones occur in training too"):
        find_task("reasoning-gym:leg_counting").data(0)


def test_a_task_of_reasoning_gym_trains(train, few_problems, tmp_path):
    status, out, complaint = train("--task", "reasoning-gym:leg_counting")
    assert (status, complaint) == (0, "")
    assert "6 prompts · 2 optimizer steps" in out
    assert "on 4 prompts kept for evaluation" in out
    assert set(lines_of(tmp_path / "out/completions.jsonl")[0]["rewards"]) == {"leg_counting"}


def test_an_unknown_task_of_reasoning_gym_gets_a_suggestion(train, few_problems):
    status, _, complaint = train("--task", "reasoning-gym:countdwon")
    assert status == 2
    assert "reasoning-gym has no task 'countdwon'. Did you mean countdown" in complaint


@pytest.mark.parametrize(
    ("arguments", "module", "package"),
    [
        (["--task", "reasoning-gym:countdown"], "reasoning_gym", "reasoning-gym"),
        (["--reward", "math_answer"], "math_verify", "math-verify"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(train, problems, monkeypatch, arguments, module, package):
    from grpo_lab.rewards import isolated

    there = isolated.importlib.util.find_spec
    monkeypatch.setattr(isolated.importlib.util, "find_spec", lambda name: None if name == module else there(name))
    isolated.GraderProcess.of.cache_clear()
    status, _, complaint = train("--dataset", problems, "--prompt-column", "question", *arguments)
    assert status == 2
    assert f"needs one more package: pip install {package}" in complaint
