"""Reports: what is written can be read after a crash, what is counted is right, and a figure shows its rows."""

import itertools
import json
import math
import re

import pytest

from grpo_lab.course.recorded import recorded_runs
from grpo_lab.course.tables import _shade, completions_table, progress_bar
from grpo_lab.training.evaluation import pass_at_k, wilson_interval
from grpo_lab.training.figures import COLOURS, training_figure
from grpo_lab.training.metrics import METRICS, JsonLines, mean_metrics

# --- JSON lines -----------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return JsonLines(tmp_path / "metrics.jsonl")


def test_what_is_appended_is_read(file):
    assert file.read() == []
    rows = [{"step": 1, "reward": 0.1, "text": "½ → \u2028 \x85 \n"}, {"step": 2, "rewards": {"a": None}}]
    file.append(rows[:1])
    file.append(rows[1:])
    assert file.read() == rows
    lines = file.path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2]
    assert lines[-1] == ""
    assert "½ →" in lines[0]  # for human readers too


def test_what_is_no_number_becomes_null(file):
    file.append([{"nan": math.nan, "inf": math.inf, "minus": -math.inf, "zero": 0.0, "text": "NaN"}])
    assert file.read() == [{"nan": None, "inf": None, "minus": None, "zero": 0.0, "text": "NaN"}]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_line_cut_off_by_a_crash_does_not_count(file, cut):
    file.append([{"step": 1, "text": "½"}, {"step": 2, "text": "½"}])
    file.path.write_bytes(file.path.read_bytes()[:-cut])  # anywhere, also in the middle of a character
    assert file.read() == [{"step": 1, "text": "½"}, {"step": 2, "text": "½"}][: 2 if cut == 1 else 1]
    file.cut_after(2)  # as a resumed run does
    file.append([{"step": 3}])
    assert file.read()[-1] == {"step": 3}
    assert file.read()[0] == {"step": 1, "text": "½"}


def test_rows_of_later_steps_are_cut(file):
    file.append([{"step": step, "i": i} for step in (10, 20, 30) for i in (0, 1)])
    file.path.with_suffix(".kept").write_text('{"step": 0}\n')  # left by a crash within cut_after
    file.cut_after(20)
    assert [(row["step"], row["i"]) for row in file.read()] == [(10, 0), (10, 1), (20, 0), (20, 1)]
    assert [path.name for path in file.path.parent.iterdir()] == ["metrics.jsonl"]
    file.cut_after(5)
    assert file.read() == []
    file.path.unlink()
    file.cut_after(5)  # nothing there, nothing to cut
    assert file.read() == []


# --- numbers --------------------------------------------------------------------------------------------


def test_counters_are_last_and_the_rest_are_means_over_the_steps_that_have_them():
    rows = [
        {"step": 1, "epoch": 0.1, "num_tokens": 100, "skipped_steps": 0, "learning_rate": 1e-3, "reward": 0.1},
        {"step": 2, "epoch": 0.2, "num_tokens": 250, "skipped_steps": 1, "learning_rate": 5e-4, "reward": 0.2, "e": 4},
        {"step": 3, "epoch": 0.3, "num_tokens": 400, "skipped_steps": 1, "learning_rate": 0.0, "reward": 0.6},
    ]
    expected = {"step": 3, "epoch": 0.3, "num_tokens": 400, "skipped_steps": 1, "learning_rate": 0.0}
    assert mean_metrics(rows) == expected | {"reward": pytest.approx(0.3), "e": 4}
    assert mean_metrics(rows[:1]) == rows[0]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96, z² = 3.8416
        (0, 10, 0.0, 0.2775),  # low = 0 exactly; high = 3.8416/10 / 1.38416
        (10, 10, 0.7225, 1.0),
        (1, 10, 0.0179, 0.4042),
        (50, 100, 0.4038, 0.5962),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(right, n, low, high):
    assert wilson_interval(right / n, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_a_wilson_interval_stays_within_0_and_1_and_holds_its_share(n):
    for right in range(n + 1):
        low, high = wilson_interval(right / n, n)
        assert 0 <= low <= right / n <= high <= 1
        assert (low, high) == pytest.approx(tuple(1 - x for x in reversed(wilson_interval(1 - right / n, n))))
        assert wilson_interval(right / n, 4 * n)[1] - wilson_interval(right / n, 4 * n)[0] < high - low


@pytest.mark.parametrize(("n", "correct"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(n, correct):
    answers = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        choices = [any(choice) for choice in itertools.combinations(answers, k)]
        assert pass_at_k(n, correct, k) == pytest.approx(sum(choices) / len(choices))


def test_a_reward_that_scored_nothing_in_one_step_does_not_spoil_the_mean():
    assert mean_metrics([{"r": 1.0}, {"r": math.nan}, {"r": 2.0}]) == {"r": 1.5}
    assert math.isnan(mean_metrics([{"r": math.nan}])["r"])


# --- the figure -----------------------------------------------------------------------------------------

ROWS = [
    {"step": 10 * i, "reward": i / 10, "frac_reward_zero_std": 0.5 - i / 20, "kl": i / 100, "entropy": 2 - i / 5,
     "completions/mean_length": 5 + i}
    for i in range(1, 6)
]  # fmt: skip
QUANTITIES = {  # panel: (title, unit on its y axis, its lines as metric -> colour)
    0: ("Reward", "share", {"reward": "reward", "frac_reward_zero_std": "zero_std"}),
    1: ("KL to the reference", "nats per token", {"kl": "kl"}),
    2: ("Entropy of the next token", "nats", {"entropy": "entropy"}),
    3: ("Completion length", "tokens", {"completions/mean_length": "length"}),
}


@pytest.mark.parametrize("panel", QUANTITIES)
def test_every_line_shows_its_rows(panel):
    title, unit, lines = QUANTITIES[panel]
    axes = training_figure(ROWS, "A run").axes[panel]
    assert axes.get_title() == title
    assert unit in axes.get_ylabel()
    assert axes.get_xlabel() == ("optimizer step" if panel >= 2 else "")  # the panels above share theirs
    assert len(axes.lines) == 2 * len(lines)
    for raw, mean, (metric, colour) in zip(axes.lines[::2], axes.lines[1::2], lines.items(), strict=True):
        values = [row[metric] for row in ROWS]
        assert list(raw.get_xdata()) == list(mean.get_xdata()) == [10, 20, 30, 40, 50]
        assert list(raw.get_ydata()) == values
        assert list(mean.get_ydata()) == pytest.approx(
            [sum(values[:4]) / 4, *[sum(values) / 5] * 3, sum(values[1:]) / 4]
        )
        assert raw.get_color() == mean.get_color() == COLOURS[colour]
        assert metric in METRICS


def test_the_figure_has_a_title_and_a_legend_and_starts_at_zero(tmp_path):
    figure = training_figure(ROWS, "A run")
    assert figure.get_suptitle() == "A run"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]  # beside the panels, on no curve
    assert legend == ["mean reward", "share of groups that teach nothing"]
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0  # heights can be compared
    figure.savefig(tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "rewards", [[-2.3, -2.2, -2.2, -2.1, -2.0], [-1.0] * 5, [0.0] * 5, [-9, 0, 9, 99, -99], [1e3] * 5]
)
def test_no_reward_falls_off_the_panel(rewards):
    axes = training_figure([{"step": step, "reward": reward} for step, reward in enumerate(rewards)]).axes[0]
    low, high = axes.get_ylim()
    assert low <= min(rewards) <= max(rewards) < high


def test_a_band_shows_how_far_the_rewards_of_a_group_spread():
    rows = [row | {"reward_std": 0.25} for row in ROWS]
    (band,) = training_figure(rows).axes[0].collections
    edge = band.get_paths()[0].vertices
    at_20 = sorted({round(y, 6) for x, y in edge.tolist() if x == 20})
    assert at_20 == [0.05, 0.55]  # the running mean of 0.1 to 0.5, which is 0.3, and 0.25 to either side
    assert band.get_label() == "± spread within a group"
    assert not training_figure(ROWS).axes[0].collections


@pytest.mark.parametrize(("spread", "edges"), [(0.5, [0.0, 0.8]), (0.8, [-0.5, 1.1])])
def test_the_band_of_shares_ends_at_0_and_1_and_that_of_other_rewards_where_it_ends(spread, edges):
    rows = [{"step": step, "reward": 0.3, "reward_std": spread} for step in (1, 2)]
    (band,) = training_figure(rows).axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert [min(heights), max(heights)] == pytest.approx(edges)


def test_a_run_without_kl_says_so_and_missing_values_are_left_out():
    rows = [{k: v for k, v in row.items() if k != "kl"} for row in ROWS]
    rows[1] |= {"reward": None}  # null in the file: no number that step
    figure = training_figure(rows)
    assert list(figure.axes[0].lines[0].get_xdata()) == [10, 30, 40, 50]
    assert not figure.axes[1].lines
    assert [text.get_text() for text in figure.axes[1].texts] == ["not computed: kl_coef = 0"]
    assert not training_figure(ROWS).axes[1].texts


def test_a_figure_of_a_run_that_has_not_begun_is_empty(tmp_path):
    figure = training_figure([])
    figure.savefig(tmp_path / "training.png")
    assert not any(axes.lines or axes.texts for axes in figure.axes)
    assert len(training_figure([{"step": 1, "kl": 0.1}]).axes[1].lines) == 2  # and one with less in its rows is drawn


def test_every_metric_is_explained():
    assert all(len(text) > 10 for text in METRICS.values())
    assert len(set(COLOURS.values())) == len(COLOURS)


# --- tables, and runs that were recorded ---------------------------------------------------------------------


def test_a_table_of_completions_shows_several_rewards_and_escapes_text():
    row = {"prompt": [{"role": "user", "content": "2<3?"}], "completion": "<yes>", "reward": 1.5, "advantage": -0.25}
    one = completions_table([row | {"rewards": {"right": 1.0}}])
    two = completions_table([row | {"rewards": {"right": 1.0, "short": None}}])
    assert "2&lt;3?" in one
    assert "&lt;yes&gt;" in one
    assert "-0.25" in one
    assert re.findall(r"<th .*?>(.*?)</th>", one) == ["prompt", "completion", "reward", "advantage"]
    assert re.findall(r"<th .*?>(.*?)</th>", two) == ["prompt", "completion", "reward", "right", "short", "advantage"]
    assert re.findall(r"<td [^>]*>([^<]*)</td>", two) == ["1.50", "1.00", "", "-0.25"]  # what did not score is not 0


def test_a_shade_says_the_sign_by_its_hue_and_the_size_by_its_strength():
    assert [_shade(x) for x in (0.0, 0.5, 9.0)] == [f"rgba(0,114,178,{a})" for a in ("0.00", "0.30", "0.60")]
    assert _shade(-0.5) == "rgba(230,159,0,0.30)"


def test_progress_counts_down():
    assert "step 1 of 4, about 30 s left" in progress_bar(1, 4, 30.2)
    assert "width:25%" in progress_bar(1, 4, 30.2)
    assert "left" not in progress_bar(4, 4, 0.0)


def test_recorded_runs_come_by_name_in_the_order_of_their_seeds(tmp_path, monkeypatch):
    for seed in (10, 2):
        folder = tmp_path / "runs" / f"K-4-seed{seed}"
        folder.mkdir(parents=True)
        info = {"seed": seed, "date": "2026-01-02", "device": "cpu", "versions": {"torch": "2.13"}}
        (folder / "run.json").write_text(json.dumps(info))
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert [run.info["seed"] for run in recorded_runs("K-4", tmp_path / "runs")] == [2, 10]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")  # a notebook's folder
    (run, _) = recorded_runs("K-4")
    assert run.metrics == [{"step": 1}]
    assert run.completions == []
    assert run.label == "recorded 2026-01-02 on cpu, PyTorch 2.13"
    with pytest.raises(ValueError, match="no recorded run 'K-5'"):
        recorded_runs("K-5")


def test_of_several_evaluations_in_a_row_of_the_log_the_last_counts_and_its_interval_with_it():
    rows = [{"step": 1, "eval/pass@1": 0.2, "eval/pass@1_low": 0.1}, {"step": 2, "reward": 1.0}]
    rows += [{"step": 3, "eval/pass@1": 0.6, "eval/pass@1_low": 0.4}]
    assert mean_metrics(rows) == {"step": 3, "eval/pass@1": 0.6, "eval/pass@1_low": 0.4, "reward": 1.0}
