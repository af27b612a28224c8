"""What fits where: choices for devices, and bytes that are really counted."""

import itertools

import pytest
import torch
from conftest import tiny_model
from matplotlib.figure import Figure

from grpo_lab import GRPOConfig
from grpo_lab.course.lessons.hardware import (
    CHOICES,
    GIB,
    choose,
    draw_accuracy,
    draw_memory,
    kept_for_backward,
    pass_at_k_judge,
)
from grpo_lab.models.preparation import enable_checkpointing
from grpo_lab.training.evaluation import pass_at_k


@pytest.mark.parametrize("memory", [None, 8 * GIB, 15 * GIB, 24 * GIB, 40 * GIB, 80 * GIB, 141 * GIB])
def test_every_choice_is_a_valid_configuration(memory):
    choice = choose(memory)
    preset = "pocket" if memory is None else "grpo"
    GRPOConfig.preset(preset, **choice.settings)


def test_more_memory_never_gives_a_smaller_choice():
    order = [choice.model_name for _, choice in CHOICES]
    assert order == sorted(order, reverse=True)
    assert [least for least, _ in CHOICES] == sorted((least for least, _ in CHOICES), reverse=True)


def test_memory_grows_in_proportion_to_the_rows_and_shrinks_with_checkpointing():
    model = tiny_model()
    one, four = (kept_for_backward(model, rows, 4, 8) for rows in (4, 16))
    assert four == pytest.approx(4 * one, rel=0.05)
    assert kept_for_backward(model, 16, 4, 2) < 0.6 * four
    model.train()
    enable_checkpointing(model)
    assert kept_for_backward(model, 16, 4, 8) < 0.5 * four


def test_the_weights_are_not_counted():
    model = tiny_model()
    assert kept_for_backward(model, 1, 1, 1) < sum(p.nbytes for p in model.parameters())


def test_bars_show_what_was_measured():
    figure = Figure()
    words = draw_memory(figure, {"as it is": 4 * 2**20, "half the rows": 2 * 2**20})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [4.0, 2.0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["100%", "50%"]
    assert words == "as it is: 4.0 MiB\nhalf the rows: 2.0 MiB"


def test_accuracy_has_its_intervals():
    def result(share):
        return {f"eval/{k}{end}": share + d for k in ("pass@1_greedy", "pass@1", "pass@8")
                for end, d in (("", 0), ("_low", -0.1), ("_high", 0.1))}  # fmt: skip

    figure = Figure()
    words = draw_accuracy(figure, result(0.25), result(0.75), 8)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.25] * 3 + [0.75] * 3
    assert words.splitlines()[1] == "after: one answer, greedy 75.0%, one answer, sampled 75.0%, one of 8 75.0%"


def with_loops(n, correct, k):
    draws = list(itertools.combinations(range(n), k))
    return sum(any(answer < correct for answer in draw) for draw in draws) / len(draws)


def one_factor_after_another(n, correct, k):
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(0, n - correct - i) / (n - i)
    return torch.tensor(1 - all_wrong, dtype=torch.float64)


def test_the_judge_of_pass_at_k_accepts_other_right_ways():
    assert pass_at_k_judge(pass_at_k)
    assert pass_at_k_judge(one_factor_after_another)
    assert [with_loops(*c.inputs) == pytest.approx(pass_at_k(*c.inputs)) for c in pass_at_k_judge.cases[:7]] == [
        True
    ] * 7
    assert pass_at_k_judge(lambda n, correct, k: ...).state == "to do"


@pytest.mark.parametrize(
    ("mistake", "wrong"), pass_at_k_judge.diagnoses.items(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_the_judge_of_pass_at_k_names_the_mistake(mistake, wrong):
    verdict = pass_at_k_judge(wrong)
    assert verdict.state == "not yet"
    assert verdict.message == f"{mistake}."
