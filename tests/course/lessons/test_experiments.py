"""Intervals by hand, luck by simulation, and recorded runs that are what the sweeps say."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from grpo_lab import pocket
from grpo_lab.course.lessons import experiments, experiments_figures
from grpo_lab.course.recorded import RecordedRun


def test_a_paired_interval_by_hand():
    # differences 1, 2, 3: mean 2, std 1, error 1 / sqrt(3) = 0.577, times t = 4.303: 2.484
    middle, low, high = experiments.paired_interval([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert middle == 2.0
    assert (low, high) == (pytest.approx(-0.484, abs=1e-3), pytest.approx(4.484, abs=1e-3))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_covers_the_truth_in_95_of_100_experiments(n):
    draws = torch.randn(20_000, n, generator=torch.Generator().manual_seed(n))
    covered = draws.mean(1).abs() <= experiments.T95[n] * draws.std(1) / math.sqrt(n)
    assert covered.float().mean().item() == pytest.approx(0.95, abs=0.006)  # 4 standard errors


def test_verdicts():
    assert [experiments.verdict(*ends) for ends in ((0.1, 1), (-1, -0.1), (-1, 1))] == [
        "higher",
        "lower",
        "inconclusive",
    ]


def test_the_judge_accepts_the_right_interval_and_names_each_mistake():
    judge = experiments.check_paired_interval
    assert judge(lambda ours, theirs, t: experiments._interval(ours, theirs, t))
    assert judge(lambda ours, theirs, t: ...).state == "to do"
    for sentence, wrong in judge.diagnoses.items():
        assert judge(wrong).message == f"{sentence}."


def test_power_without_a_difference_is_half_of_the_five_per_cent():
    none = experiments.power(0.0, 1.0, experiments.standard_experiments(20_000))
    assert none == pytest.approx([0.025] * len(none), abs=0.005)
    some = experiments.power(1.0, 1.0, experiments.standard_experiments(2000))
    assert some[0] < some[-1] == pytest.approx(1.0, abs=0.01)


def test_tokens_until_a_reward_is_reached():
    # the mean of 0 and 1 over three neighbours on each side: steps 1 to 7 see 0 0 0 0 1 1 1, the fourth sees 3 of 7
    rows = [{"reward": float(i > 3), "num_tokens": 10 * (i + 1)} for i in range(7)]
    run = RecordedRun({}, rows, [])
    assert experiments.tokens_until(run, 0.4) == 40
    assert experiments.tokens_until(run, 0.9) is None


def test_pass_at_k_averages_over_prompts():
    # of 4 draws 1 and 4 are right: pass@1 = (1/4 + 1) / 2; pass@2 = (1 - 3/6 + 1) / 2
    assert experiments.pass_curve([1, 4], 4, (1, 2, 4)) == pytest.approx([0.625, 0.75, 1.0])


def test_best_of_counts_right_draws_for_each_prompt():
    counts, length = experiments.best_of(*pocket.load(), prompts=20, draws=4)
    assert len(counts) == 20
    assert set(counts) <= set(range(5))
    assert 0.1 < sum(counts) / 80 < 0.6  # about 0.3
    assert length == pytest.approx(6, abs=0.2)


@pytest.mark.parametrize("name", experiments.SWEEPS)
def test_every_setting_of_a_sweep_has_three_seeds_and_as_many_completions(name):
    for runs in experiments.sweep(name).values():
        assert [run.info["seed"] for run in runs] == [0, 1, 2]
        for run in runs:
            config = run.info["config"]
            assert config["num_generations_per_prompt"] * config["batch_size"] == 128
            assert len(run.metrics) == 100


def test_a_sweep_changes_what_it_says():
    for label, runs in experiments.sweep("K").items():
        assert runs[0].info["config"]["num_generations_per_prompt"] == int(label)
    for label, runs in experiments.sweep("β").items():
        assert runs[0].info["config"]["kl_coef"] == float(label)


def test_the_forest_shows_the_paired_differences():
    figure = Figure()
    words = experiments_figures.draw_sweep(figure, "β", experiments.MEASURES[0])
    middle, low, high = experiments.compare("β", experiments.MEASURES[0])["2"]
    bar, point = figure.axes[1].lines[6:8]  # the fourth setting
    assert list(bar.get_xdata()) == pytest.approx([100 * low, 100 * high])
    assert point.get_xdata()[0] == pytest.approx(100 * middle)
    assert f"{100 * middle:+.1f}" in words


def test_where_there_is_nothing_to_find_the_power_figure_counts_false_alarms_of_both_signs():
    words = experiments_figures.draw_power(Figure(), 3, 0.0, 1.0)
    assert "nothing to find" in words
    share = int(words.split(" seeds: ")[1].split("%")[0])
    assert share == pytest.approx(5, abs=2)  # 4 standard errors of 2000 experiments


def test_eight_lines_share_two_looks_and_five_have_their_own():
    crowd, few = Figure(), Figure()
    experiments_figures.draw_sweep(crowd, "variant", experiments.MEASURES[0])
    experiments_figures.draw_sweep(few, "K", experiments.MEASURES[0])
    looks = [len({(line.get_color(), line.get_linestyle()) for line in f.axes[0].lines}) for f in (crowd, few)]
    assert looks == [2, 5]
    assert [text.get_text() for text in crowd.axes[0].get_legend().texts] == ["grpo", "the 7 others"]


def test_the_power_figure_marks_the_chosen_seeds():
    figure = Figure()
    words = experiments_figures.draw_power(figure, 5, 2.0, 1.0)
    marked = figure.axes[0].lines[2]
    assert marked.get_xdata()[0] == 5
    assert f"{marked.get_ydata()[0]:.0%}" in words
