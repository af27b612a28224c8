import pytest
from matplotlib.figure import Figure

from grpo_lab.course.lessons import own_data
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset


def test_the_smaller_factor_begins_a_right_answer():
    found = own_data.smaller_factors(2000)
    assert len(found) > 500
    for prompt, first in found.items():
        numbers, target = prompt.rstrip("=").split(":")
        a, b, c = map(int, numbers.split(","))
        orders = [(x, y, z) for x, y, z in ((a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a))]
        wanted = [f"{x}*{y}+{z}" for x, y, z in orders if x == first and x < y and x * y + z == int(target)]
        assert wanted
        assert countdown([prompt], wanted[:1]) == [1.0]


def test_its_prompts_are_those_of_the_training_set():
    assert set(own_data.smaller_factors(2000)) <= set(countdown_dataset(2048).columns["prompt"])


def test_the_judge_accepts_the_reward():
    assert own_data.judge(own_data.begins_with)


@pytest.mark.parametrize("sentence", own_data.judge.diagnoses)
def test_the_judge_names_each_mistake(sentence):
    verdict = own_data.judge(own_data.judge.diagnoses[sentence])
    assert not verdict
    assert sentence in verdict.message


def test_the_judge_expects_that_an_empty_completion_makes_a_function_fail():
    def by_first_character(prompts, completions, first):
        return [float(c[0] == str(f)) for c, f in zip(completions, first, strict=True)]

    message = own_data.judge(by_first_character).message
    assert message == "an empty completion has no first character."


def test_the_judge_sees_a_stub():
    assert own_data.judge(lambda prompts, completions, first: ...).state == "to do"


def test_the_curves_are_the_two_rewards():
    rows = [{"step": n, "rewards/countdown/mean": 0.5, "rewards/begins_with/mean": n / 10} for n in range(1, 7)]
    figure = Figure()
    words = own_data.draw_weights(figure, {"a": rows, "b": rows})
    assert figure.axes[1].lines[2].get_ydata().tolist() == [n / 10 for n in range(1, 7)]
    assert "a; last five steps: countdown 0.50, begins_with 0.40" in words
