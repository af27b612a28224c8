"""Several runs in one picture: seeds are joined, lines show their rows, and what is not there is said."""

import json
import math
import re

import pytest

from grpo_lab.course.comparison import (
    COLOURS,
    DEFAULT_METRICS,
    LINES,
    comparison_figure,
    curve,
    logged,
    read_runs,
    summary,
)
from grpo_lab.training.metrics import METRICS


def rows(*rewards, start=1, **more):
    return [{"step": start + i, "reward": reward, **more} for i, reward in enumerate(rewards)]


@pytest.fixture
def folder(tmp_path):
    """Makes the folder of a run with these rows."""

    def make(name, content):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        return tmp_path / name

    return make


# --- reading ------------------------------------------------------------------------------------------------


def test_seeds_side_by_side_are_one_run_and_a_single_seed_keeps_its_name(folder):
    one, two = rows(0.1), rows(0.2)
    folders = [folder("K-4-seed0", one), folder("K-4_seed10", two), folder("dr", one), folder("K-2-seed0", two)]
    assert read_runs(folders) == {"K-4": [one, two], "dr": [one], "K-2-seed0": [two]}
    assert read_runs([*folders, str(folders[0]) + "/"])["K-4"] == [one, two]  # given twice, drawn once


def test_folders_of_the_same_name_are_told_apart_by_what_is_above_them(folder):
    runs = read_runs([folder(name, rows(0.1)) for name in ("a/x/out", "b/x/out", "a/x-seed0", "b/x-seed0")])
    assert list(runs) == ["a/x/out", "b/x/out", "a/x-seed0", "b/x-seed0"]


def test_a_run_is_not_joined_with_the_seeds_of_its_name(folder):
    plain, seeds = folder("K-4", rows(0.1)), [folder(f"K-4-seed{i}", rows(0.2)) for i in (0, 1)]
    assert {name: len(lists) for name, lists in read_runs([plain, *seeds]).items()} == {
        "K-4": 1, "K-4-seed0": 1, "K-4-seed1": 1
    }  # fmt: skip
    assert list(read_runs(seeds)) == ["K-4"]


def test_this_folder_has_a_name_too(folder, monkeypatch):
    monkeypatch.chdir(folder("mine", rows(0.1)))
    assert list(read_runs(["."])) == ["mine"]


@pytest.mark.parametrize("names", [[], ["checkpoint-1", "final_model"], list("abcdefg")], ids=len)
def test_a_folder_without_metrics_is_refused_with_what_is_there(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    inside = {0: "nothing", 2: "checkpoint-1, final_model", 7: "a, b, c, d, e …"}[len(names)]
    with pytest.raises(ValueError, match=re.escape(f"no metrics.jsonl in {tmp_path}; it holds {inside}. Give a run's")):
        read_runs([tmp_path])


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(ValueError, match=f"there is no folder .*{name}"):
            read_runs([tmp_path / name])


@pytest.mark.parametrize("content", ["", "\n\n", "[1]\n7\nnull\n", '{"reward": 1}\n', '{"step": NaN}\n', "\0\xff{"])
def test_metrics_without_a_row_are_refused(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no rows: no step"):
        read_runs([tmp_path])


# --- the lines ------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_of_the_smoothed_seeds_between_the_lowest_and_the_highest():
    # running means over 3 neighbours on either side; two rows are within reach of each other: 0.2 and 0.5
    assert curve([rows(0.1, 0.3), rows(0.4, 0.6)], "reward") == [
        (1, pytest.approx(0.35), pytest.approx(0.2), pytest.approx(0.5)),
        (2, pytest.approx(0.35), pytest.approx(0.2), pytest.approx(0.5)),
    ]


def test_only_steps_that_every_seed_has_are_averaged():
    points = curve([rows(1.0, 1.0, 1.0, 1.0), rows(0.0, 0.0, start=2)], "reward")
    assert points == [(2, 0.5, 0.0, 1.0), (3, 0.5, 0.0, 1.0)]
    assert curve([rows(1.0), rows(1.0, start=5)], "reward") == []


def test_what_is_no_number_is_left_out_and_steps_are_put_in_order():
    mixed = [
        {"step": 3, "reward": 1.0}, {"step": 1, "reward": 1.0}, {"step": 2, "reward": None}, {"step": 4},
        {"step": 5, "reward": "1"}, {"step": 6, "reward": math.nan}, {"step": 7, "reward": True},
    ]  # fmt: skip
    assert [step for step, *_ in curve([mixed], "reward")] == [1, 3]


RUNS = {
    "one": [rows(0.0, 0.5, 1.0, kl=0.1, entropy=0.2, **{"completions/mean_length": 6})],
    "many": [rows(0.2, 0.2, 0.2, entropy=0.3), rows(0.4, 0.4, 0.4, entropy=0.3)],
}


def test_a_figure_shows_the_curves_in_panels_with_meaning_and_unit(tmp_path):
    figure = comparison_figure(RUNS)
    for panel, metric in zip(figure.axes, DEFAULT_METRICS, strict=True):
        assert panel.get_ylabel() == metric
        assert panel.get_title().replace("\n", " ").lower() == METRICS[metric].lower()
        assert panel.get_xlabel() == "optimizer step"
        for line, seeds in zip(panel.lines, RUNS.values(), strict=True):
            points = curve(seeds, metric)
            assert list(line.get_xdata()) == [step for step, *_ in points]
            assert list(line.get_ydata()) == [mean for _, mean, *_ in points]
            low, high = panel.get_ylim()
            assert low <= 0
            assert all(y < high for y in line.get_ydata())
    figure.savefig(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_level_line_and_a_single_step_are_seen():
    (panel,) = comparison_figure({"a": [rows(6.0, 6.0)], "b": [rows(6.0)]}, ["reward"]).axes
    assert panel.get_ylim()[1] > 6.2
    assert [line.get_marker() for line in panel.lines] == ["None", "o"]


def test_the_band_spans_the_seeds_and_a_single_run_has_none():
    reward, _, entropy, _ = comparison_figure(RUNS).axes
    (band,) = reward.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert [min(heights), max(heights)] == pytest.approx([0.2, 0.4])
    assert len(entropy.collections) == 1


def test_the_legend_names_every_run_on_no_curve_and_no_two_runs_look_the_same(tmp_path):
    names = [f"run {i}" for i in range(len(COLOURS) * len(LINES))]
    figure = comparison_figure({name: [rows(0.1, 0.2)] for name in names}, ["reward"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    looks = {(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == len(names)
    figure.draw_without_rendering()
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
    with pytest.raises(ValueError, match=r"29 runs are too many to tell apart\. Give at most 28"):
        comparison_figure({name: [rows(0.1)] for name in (*names, "one more")}, ["reward"])


@pytest.mark.parametrize("name", ["_hidden", "a$b$", "$\\frac$", "x" * 200, "two words", "\udcff", "%s {x} <b>"])
def test_any_name_of_a_folder_can_be_drawn(name, tmp_path):
    figure = comparison_figure({name + end: [rows(0.1, 0.2)] for end in ("", "1", "2", "3")}, ["reward"])
    figure.savefig(tmp_path / "comparison.png")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


@pytest.mark.parametrize(("number", "panels"), [(1, 1), (2, 2), (3, 3), (5, 5)])
def test_as_many_panels_as_metrics(number, panels):
    names = ["reward", "kl", "entropy", "completions/mean_length", "step"][:number]
    assert len(comparison_figure(RUNS, names).axes) == panels


def test_a_metric_that_no_run_has_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"no run has the metric 'rewrd'\. There is completions/mean_length, entropy, kl"
    ):
        comparison_figure(RUNS, ["reward", "rewrd"])
    assert logged(RUNS) == ["completions/mean_length", "entropy", "kl", "reward"]


def test_the_metric_of_one_reward_function_is_explained():
    (panel,) = comparison_figure({"a": [rows(0.1, **{"rewards/mine/mean": 1.0})]}, ["rewards/mine/mean"]).axes
    assert panel.get_title().startswith("Mean of one reward function")


# --- the words ------------------------------------------------------------------------------------------------


def test_the_words_say_what_is_drawn():
    lines = summary(RUNS, DEFAULT_METRICS).splitlines()
    assert lines[1] == "  one, steps 1 to 3: reward 0.5 at first, 0.5 at last"  # three rows, all within reach
    assert lines[2] == (
        "  many, 2 seeds, steps 1 to 3: reward 0.3 at first, 0.3 at last (0.2 to 0.4); no kl, completions/mean_length"
    )


def test_the_words_say_what_is_left_out():
    text = summary({"a": [rows(1.0, 1.0, 1.0, 1.0), rows(0.0, 0.0)]}, ["reward"])
    assert "steps 1 to 2: reward 0.5 at first, 0.5 at last (0 to 1); beyond step 2, up to 4, not all seeds have" in text
    assert "b, 2 seeds: nothing to draw" in summary({"b": [rows(1.0), rows(1.0, start=2)]}, ["reward"])
    assert "kl 0.1 at first" in summary({"c": [[{"step": 1, "kl": 0.1}]]}, ["kl"])
