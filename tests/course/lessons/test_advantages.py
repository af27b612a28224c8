from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from grpo_lab.course.lessons import advantage_figures as figures
from grpo_lab.course.lessons import advantages as lesson
from grpo_lab.course.recorded import RecordedRun
from grpo_lab.training.batches import StepRecord
from grpo_lab.training.evaluation import wilson_interval


def words(draw, *arguments, ground=lambda figure: None, **settings) -> tuple[Figure, str]:
    figure = Figure(figsize=(9, 5.6))
    ground(figure)
    return figure, draw(figure, *arguments, **settings)


def test_dead_groups_of_two_fair_coins_are_half():
    assert lesson.dead_share(0.5, 2) == 0.5  # both heads 1/4, both tails 1/4
    assert lesson.dead_share(0.3, 2) == pytest.approx(0.09 + 0.49)
    assert lesson.dead_share(0.0, 64) == lesson.dead_share(1.0, 64) == 1.0


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("K", [2, 4, 16])
def test_drawn_groups_are_dead_as_often_as_the_formula_says(K, p):
    rewards = lesson.coin_rewards(K, p)
    dead = ((rewards.sum(1) == 0) | (rewards.sum(1) == K)).float().mean().item()
    low, high = wilson_interval(dead, len(rewards), z=4)  # the draws are fixed: no luck is involved
    assert low <= lesson.dead_share(p, K) <= high


def test_a_group_that_grows_keeps_its_completions():
    assert torch.equal(lesson.coin_rewards(64, 0.3)[:, :8], lesson.coin_rewards(8, 0.3))


def test_the_expected_push_is_what_drawing_gives():
    # rewards of K = 2 at p = 1/2: one right and one wrong half of the time, push (1/2 * 1/2 + 1/2 * 1/2) / 2 = 1/4
    p = torch.tensor([0.5, 0.1], dtype=torch.float64)
    assert lesson.expected_push(p, 2, scale="none").tolist() == pytest.approx([0.125, 0.045])


@pytest.mark.parametrize("K", [2, 3, 8, 64])
def test_leave_one_out_is_unbiased_and_the_mean_shrinks_by_one_kth(K):
    p = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    true = p * (1 - p)
    torch.testing.assert_close(lesson.expected_push(p, K, baseline="leave-one-out", scale="none"), true)
    torch.testing.assert_close(lesson.expected_push(p, K, scale="none"), true * (1 - 1 / K))


def test_the_std_favours_hard_prompts_except_in_pairs():
    p = torch.tensor([0.05, 0.5], dtype=torch.float64)
    for K, more in ((2, False), (8, True), (64, True)):
        weight = lesson.expected_push(p, K) / lesson.expected_push(p, K, scale="none")
        assert (weight[0] > 1.1 * weight[1]).item() == more


def test_rewards_of_a_step_come_back_as_groups():
    rows = [{"prompt": p, "reward": r} for p, r in (("a", 1.0), ("a", 0.0), ("b", 0.0), ("b", 0.0))]
    assert lesson.group_rewards(StepRecord(1, {}, rows)).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_flagship_shows_every_group_once_and_all_completions():
    figure, text = words(figures.draw_groups, ground=figures.ground_of_groups, K=4, p=0.3)
    columns, histogram, dead, noise = figure.axes
    assert "K = 4" in columns.texts[-1].get_text()
    heights = sum(patch.get_data().values.sum() - patch.get_data().baseline.sum() for patch in histogram.patches)
    assert heights == pytest.approx(1.0)
    assert dead.lines[1].get_data()[0] == pytest.approx(0.3)
    assert noise.lines[1].get_data()[0] == 4
    assert text.startswith("K = 4, p = 0.30: dead groups 0.248 by the formula")


def test_every_column_of_the_flagship_is_marked_if_all_groups_are_dead():
    figure, text = words(figures.draw_groups, ground=figures.ground_of_groups, K=2, p=0.02)
    marks = figure.axes[0].lines[1].get_xdata()
    rewards = lesson.coin_rewards(2, 0.02)[: figures.SHOWN]
    assert len(marks) == (rewards[:, 0] == rewards[:, 1]).sum()
    assert "0.961 by the formula" in text


def test_the_difficulty_figure_says_what_it_draws():
    figure, text = words(figures.draw_difficulty, ground=figures.ground_of_difficulty, K=2)
    assert "RLOO 0.250" in text
    assert "1.00 times the weight" in text
    ratio = figure.axes[1].lines[0].get_ydata()
    assert ratio == pytest.approx(np.full(97, 2**0.5), abs=3e-4)  # std_eps


def test_std_eps_at_its_default_tells_signal_from_rounding():
    _, text = words(figures.draw_std_eps)
    assert "std_eps 1e-04: clear signal 0.87, faint 0.74, none 0.0006" in text


def test_real_groups_are_counted_by_right_answers():
    rewards = torch.tensor([[[1.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])  # [steps, P, K]
    ground = partial(figures.ground_of_rollouts, rewards=rewards)
    figure, text = words(figures.draw_rollouts, rewards, 1, ground=ground)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([0.25, 0.5, 0.25])
    assert "mean reward 0.50; 2 of 4 groups are dead; were all prompts equally hard, 2.0 would be" in text
    assert "with 0 to 2 right answers: 0.25 0.50 0.25" in text


def test_recorded_runs_are_averaged_over_seeds():
    def run(*rewards):
        rows = [{"reward": r, "frac_reward_zero_std": 1 - r} for r in rewards]
        return RecordedRun({}, rows * 10, [])

    runs = {2: [run(0.0), run(1.0)], 4: [run(0.5)]}
    assert lesson.recorded_by_k(runs, "reward")[2] == [0.5] * 10
    figure, text = words(figures.draw_recorded, runs)
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx([0.5] * 10)
    assert (
        "K =  2: dead groups 0.50 at the start, 0.50 at the end; reward 0.50 to 0.500 (2 seeds: 0.000 to 1.000)" in text
    )
