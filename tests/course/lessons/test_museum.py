"""The museum shows what it says it shows, gives nothing away, and leaves the package as it found it."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from grpo_lab import checks
from grpo_lab.algorithm import kl, losses
from grpo_lab.course.lessons import museum, museum_figures
from grpo_lab.course.lessons.museum_bugs import BUGS, EXHIBITS, broken, patched
from grpo_lab.course.recorded import RecordedRun
from grpo_lab.training import step

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_one_line_of_the_package_as_it_is_now(name):
    assert callable(broken(BUGS[name]))
    assert BUGS[name].right != BUGS[name].wrong


def test_each_bug_has_one_exhibit():
    assert sorted(EXHIBITS.values()) == sorted(BUGS)
    assert list(museum.SUSPECTS) == list(range(1, 13))


@pytest.mark.parametrize("name", BUGS)
def test_a_patch_reaches_who_imported_the_function_and_is_taken_back(name):
    def seen():
        return step.grpo_loss, losses.kl_estimate, kl.kl_estimate, step.accumulate_gradients

    before = seen()
    with patched(BUGS[name]):
        during = seen()
    reached = BUGS[name].function in ("algorithm.kl.kl_estimate", "training.step.accumulate_gradients")
    assert (during != before) == reached
    assert during[1] is during[2]
    assert seen() == before


def test_the_judges_name_the_bugs_of_pure_functions():
    assert "inverted" in checks.clipped_surrogate(broken(BUGS["clip"])).message
    assert "upside down" in checks.kl_estimate(broken(BUGS["kl-upside-down"])).message
    assert "no gradient" in checks.kl_estimate(broken(BUGS["kl-gradient"])).message


@pytest.mark.parametrize("exhibit", EXHIBITS)
def test_the_judge_says_yes_to_one_suspect_and_shows_its_line(exhibit):
    yes = [number for number in museum.SUSPECTS if museum.judge(exhibit, number)]
    assert [museum.SUSPECTS[n] for n in yes] == [BUGS[EXHIBITS[exhibit]].name]
    assert BUGS[EXHIBITS[exhibit]].wrong in repr(museum.judge(exhibit, yes[0]))


def test_the_judge_answers_a_wrong_diagnosis_with_what_one_would_see_and_gives_nothing_away():
    verdict = museum.judge("A", 1)  # the clip
    assert verdict.state == "not yet"
    assert verdict.hint == BUGS["clip"].expect
    assert BUGS[EXHIBITS["A"]].name not in repr(verdict)
    assert museum.judge("A", ...).state == "to do"
    assert [museum.judge("A", odd).state for odd in (0, 13, "clip", 2.5)] == ["not yet"] * 4


def test_a_hearing_shows_what_was_answered_and_counts_what_is_right():
    end = list(EXHIBITS.values()).index("end")
    number = next(n for n, name in museum.SUSPECTS.items() if name == BUGS["end"].name)
    some = museum.hear({"A": number, "B": number, "C": ...})
    assert end == 0
    assert not some
    assert [verdict.state for verdict in some.answered] == ["ok", "not yet"]
    assert repr(some).endswith("1 of 12 named")
    assert some._repr_html_().count('role="status"') == 2
    assert repr(museum.hear({})) == "[to do] exhibits: no diagnosis yet.\n0 of 12 named"
    numbers = {name: number for number, name in museum.SUSPECTS.items()}
    assert museum.hear({letter: numbers[BUGS[bug].name] for letter, bug in EXHIBITS.items()})


@pytest.mark.parametrize("exhibit", [museum.HEALTHY, *EXHIBITS])
def test_recordings_are_whole_and_do_not_name_their_bug(exhibit):
    run = museum.recorded(exhibit)
    assert [row["step"] for row in run.metrics] == list(range(1, museum.SETTINGS["max_steps"] + 1))
    assert {row["step"] for row in run.completions} == set(museum.SHOWN_STEPS)
    assert run.info["changed"] == museum.SETTINGS
    text = json.dumps(run.info)
    assert not any(bug.name in text or bug.wrong in text for bug in BUGS.values())


def test_the_learners_notebook_does_not_hold_the_answers():
    path = ROOT / "notebooks" / "10_bug_museum.ipynb"
    source = "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    assert "diagnosis |=" not in source
    assert "your code here" in source


@pytest.mark.parametrize("exhibit", [museum.HEALTHY, "G"])
def test_a_live_run_says_what_the_recorded_one_says(exhibit, recwarn):
    _, (record,) = museum.run(exhibit, steps=1)
    first = museum.recorded(exhibit).metrics[0]
    assert record.metrics["reward"] == pytest.approx(first["reward"], abs=0.02)  # a token may flip
    assert record.metrics[museum.DIFFERENCE] == pytest.approx(first[museum.DIFFERENCE], abs=0.01)
    assert bool(recwarn) == (exhibit == "G")


def test_the_curves_are_the_recorded_numbers():
    figure = Figure()
    words = museum_figures.draw_exhibit(figure, "A")
    healthy, ours = figure.axes[3].lines[:2]
    assert list(ours.get_ydata()) == [r["completions/mean_length"] for r in museum.recorded("A").metrics]
    assert list(healthy.get_ydata()) == [r["completions/mean_length"] for r in museum.recorded(museum.HEALTHY).metrics]
    assert "length 5.00 (6.00)" in words


def test_the_samples_of_the_first_and_the_last_rollout_are_shown():
    figure = Figure()
    words = museum_figures.draw_exhibit(figure, "K", "samples, first rollout")
    assert words.startswith("Exhibit K, step 1.")
    shown = [text.get_text() for text in figure.texts]
    assert all(row["completion"] in shown for row in museum.recorded("K").completions[:16])
    assert "step 57" in museum_figures.draw_exhibit(Figure(), "K", "samples, last rollout")


def test_a_band_is_mean_and_five_standard_deviations():
    runs = [RecordedRun({}, [{"kl": value}, {"kl": 1.0}], []) for value in (1.0, 2.0, 3.0)]  # std 1, dividing by n - 1
    assert museum_figures.band(runs, "kl") == ([-3.0, 1.0], [7.0, 1.0])


def test_leaving_a_band_takes_three_steps_in_a_row():
    low, high = [0.0] * 7, [1.0] * 7
    assert museum_figures.leaves([2.0, 2.0, 0.5, -1.0, 2.0, 2.0, 0.5], low, high) == 4
    assert museum_figures.leaves([2.0, 2.0, 0.5, 2.0, 2.0, 0.5, 2.0], low, high) is None


@pytest.mark.parametrize("run", museum_figures.COLLAPSES)
def test_the_collapsed_runs_did_collapse(run):
    words = museum_figures.draw_collapse(Figure(), run)
    assert "0% after" in words
    assert "recorded" in words
