import math
import random

import pytest
import torch
from matplotlib.figure import Figure

from grpo_lab import pocket
from grpo_lab.course.lessons import reward_figures as figures
from grpo_lab.course.lessons import rewards as lesson
from grpo_lab.rewards.verifiable import final_number


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.load()[1]


def test_the_package_reads_every_trap_and_the_naive_parser_only_three():
    for text, answer in lesson.TRAPS:
        assert final_number(text) == (None if answer is None else final_number(answer))
    assert sum(lesson.last_digits(text) == answer for text, answer in lesson.TRAPS) == 3


def test_taste_by_hand():
    assert lesson.taste("5*3+7") == 2 + 3  # one *, the larger first
    assert lesson.taste("3-5-7") == -4  # two -
    assert lesson.taste("7*5*3") == 4 + 3


def test_choices_follow_the_taste_as_often_as_bradley_and_terry_say():
    pairs = lesson.preference_pairs(1000, seed=3)
    gaps = torch.tensor([lesson.taste(p.chosen) - lesson.taste(p.rejected) for p in pairs])
    expected = gaps.abs().sigmoid().mean().item()  # the better one is chosen so often
    share = ((gaps > 0).float() + 0.5 * (gaps == 0).float()).mean().item()
    assert share == pytest.approx(expected, abs=0.06)  # the draws are fixed
    assert lesson.preference_pairs(5, seed=3) == pairs[:5]


def test_bradley_terry_by_hand():
    loss = lesson.bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(2)) / 2)


def test_bradley_terry_survives_scores_far_apart_and_ignores_a_shift():
    far = torch.tensor([-500.0], requires_grad=True)
    loss = lesson.bradley_terry_loss(far, torch.tensor([500.0]))
    loss.backward()
    assert loss.item() == 1000.0
    assert far.grad.item() == -1.0
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    torch.testing.assert_close(lesson.bradley_terry_loss(a + 7, b + 7), lesson.bradley_terry_loss(a, b))


def test_making_the_classifier_leaves_the_random_numbers_alone(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = (lesson.tiny_classifier(tokenizer, seed=s) for s in (0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert one.config.num_labels == 1
    assert not torch.equal(one.score.weight, two.score.weight)


def test_padding_does_not_change_a_score(tokenizer):
    model = lesson.tiny_classifier(tokenizer).eval()
    prompts, answers = ["3,5,7:22="] * 2, ["5*3+7", "22"]
    with torch.no_grad():
        together = lesson.scores(model, tokenizer, prompts, answers)
        alone = torch.cat([lesson.scores(model, tokenizer, [p], [a]) for p, a in zip(prompts, answers, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_reward_model_learns_in_a_few_steps(tokenizer):
    pairs = lesson.preference_pairs(600, seed=1)
    state = random.getstate()
    losses = lesson.train_reward_model(lesson.tiny_classifier(tokenizer), tokenizer, pairs, steps=40)
    assert random.getstate() == state
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_marks_by_hand():
    prompts, answers = ["3,5,7:22="] * 5, ["5*3+7", "7*5*3", "3+5+7", "3+5", "oops"]
    assert lesson.part_marks(prompts, answers) == pytest.approx([1, 105 / 22, 15 / 22, 0, 0])
    assert lesson.capped_marks(prompts, answers) == pytest.approx([1, 1, 15 / 22, 0, 0])
    assert lesson.part_marks(["2,2,4:0="], ["2+2-4"]) == [0.0]


def test_part_marks_are_hacked_and_the_rule_watches(tmp_path):
    run = lesson.short_run(lesson.part_marks, str(tmp_path), steps=12)
    records = list(run.steps())
    paid = [r.metrics["reward"] for r in records]
    right = [r.metrics["rewards/right/mean"] for r in records]
    assert paid == pytest.approx([r.metrics["rewards/part_marks/mean"] for r in records])
    assert sum(paid[-3:]) > 2 * sum(paid[:3])
    assert sum(right[-3:]) < sum(right[:3])


def test_a_run_goes_on_from_a_model_that_was_trained(tmp_path):
    hacked = lesson.short_run(lesson.part_marks, str(tmp_path / "a"), steps=1).model
    assert lesson.short_run(lesson.right, str(tmp_path / "b"), model=hacked).model is hacked


def test_the_figures_say_what_they_draw():
    figures.ground_of_bradley_terry(figure := Figure())
    assert "probability 0.88" in figures.draw_bradley_terry(figure, 1.0, -1.0)
    assert figure.axes[1].lines[-1].get_ydata() == pytest.approx([math.log(1 + math.exp(-2))])
    figure = Figure()
    hidden = torch.tensor([0.0, 0.0, 2.0])
    text = figures.draw_reward_model(figure, [0.7, 0.5], hidden, 3 * hidden + 1, 0.3)
    assert "correlation of 1.00" in text
    assert figure.axes[1].lines[1].get_ydata() == pytest.approx([1.0, 7.0])
    figure = Figure()
    text = figures.draw_hacked(figure, {"exact": ([0.5] * 6, [0.25] * 6)})
    assert text == "exact     paid 0.50 to 0.50, right 0.25 to 0.25"
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx([0.25] * 6)
