import inspect
import math
from pathlib import Path

import nbformat
import pytest
import torch
from matplotlib.figure import Figure

from grpo_lab import GRPOConfig, GRPOTrainer, checks, pocket
from grpo_lab.course.lessons import scratch
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"
STEPS = 3


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return pocket.load()


@pytest.fixture(scope="module")
def group(model_and_tokenizer):
    return scratch.compute_group(scratch.training_step, *model_and_tokenizer, updates=3)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    (by_hand, tokenizer), (trained, _) = pocket.load(), pocket.load()
    dataset = countdown_dataset(64)
    hand = [r.metrics for r in scratch.grpo_by_hand(by_hand, tokenizer, dataset, steps=STEPS, P=4, K=4)]
    config = GRPOConfig.preset(
        "pocket", max_steps=STEPS, lr_scheduler="constant", warmup_steps=0, max_grad_norm=math.inf, batch_size=4,
        num_generations_per_prompt=4, output_dir=str(tmp_path_factory.mktemp("run")),
    )  # fmt: skip
    trainer = GRPOTrainer(trained, None, countdown, tokenizer, config, dataset)
    return hand, [record.metrics for record in trainer.steps()], by_hand, trained


def test_the_step_of_the_lesson_satisfies_its_judge():
    assert checks.training_step(scratch.training_step)


@pytest.mark.parametrize("folder", [NOTEBOOKS, NOTEBOOKS / "solutions"], ids=["learner's", "solved"])
@pytest.mark.parametrize("function", [scratch.logits_for, scratch.roll_out, scratch.grpo_by_hand])
def test_the_loop_of_the_lesson_is_that_of_notebook_07(folder, function):
    notebook = nbformat.read(folder / "07_grpo_from_scratch.ipynb", 4)
    assert inspect.getsource(function).strip() in [cell.source for cell in notebook.cells]


def test_the_loop_by_hand_gives_the_trainers_numbers(two_runs):
    hand, by_trainer, *_ = two_runs
    for name in hand[0]:
        assert scratch.largest_difference(hand, by_trainer, name) < 1e-5, name


def test_the_loop_by_hand_gives_the_trainers_weights(two_runs):
    *_, by_hand, trained = two_runs
    for ours, theirs in zip(by_hand.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)  # rounding: the trainer reads each prompt once


def test_the_four_completions_differ_and_earn_1_0_0_1(group):
    assert len(set(group.texts)) == 4
    assert countdown([scratch.PROMPT] * 4, group.texts) == [1.0, 0.0, 0.0, 1.0]


def test_the_right_ones_rise_and_the_wrong_ones_fall(group):
    change = group.probabilities["1, 0, 0, 1"][-1] - group.probabilities["1, 0, 0, 1"][0]
    assert (change > 0).tolist() == [True, False, False, True]


def test_equal_rewards_move_nothing(group):
    dead = group.probabilities["1, 1, 1, 1"]
    assert dead.equal(dead[:1].expand_as(dead))


def test_a_wrong_completion_rises_with_the_first_token_that_it_shares(group):
    change = group.probabilities["1, 0, 0, 0"][-1] - group.probabilities["1, 0, 0, 0"][0]
    shares = group.texts.index("5+9+2")
    assert group.texts[0][0] == group.texts[shares][0]
    assert change[shares] > 0


def test_the_model_is_left_as_it_was(model_and_tokenizer, group):
    fresh, _ = pocket.load()
    assert all(a.equal(b) for a, b in zip(model_and_tokenizer[0].parameters(), fresh.parameters(), strict=True))


def test_the_bars_are_the_probabilities(group):
    scratch.ground_of_group(figure := Figure(), group)
    words = scratch.draw_group(figure, group, "1, 0, 0, 1", 2)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    history = group.probabilities["1, 0, 0, 1"]
    assert heights == [*history[0].tolist(), *history[2].tolist()]
    assert f"{group.texts[0]} {history[0, 0]:.3f} to {history[2, 0]:.3f}" in words


def test_two_runs_are_drawn_over_each_other(two_runs):
    hand, by_trainer, *_ = two_runs
    figure = Figure()
    words = scratch.draw_two_runs(figure, {"a": hand, "b": by_trainer})
    line, circles = figure.axes[0].lines
    assert line.get_ydata().tolist() == [row["reward"] for row in hand]
    assert circles.get_ydata().tolist() == [row["reward"] for row in by_trainer]
    assert "differ by at most 0.000" in words


def test_every_metric_of_a_run_is_explained(two_runs):
    history = two_runs[1]
    table = scratch.metrics_table(history)
    assert table.count("\n") == len(history[-1]) + 1
    assert "| `reward` | mean reward of the completions |" in table
