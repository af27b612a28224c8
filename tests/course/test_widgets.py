"""Sliders move figures, runs are watched, samples are browsed: without a browser, through the widgets' own values."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

ipywidgets = pytest.importorskip("ipywidgets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ipywidgets|traitlets|jupyter_client")

from grpo_lab.course import widgets  # noqa: E402
from grpo_lab.course.widgets import Explorer, Picture, SampleBrowser, choice, slider, steps, watch  # noqa: E402
from grpo_lab.tasks.pocket.make import make_tokenizer  # noqa: E402
from grpo_lab.training.batches import StepRecord  # noqa: E402

VIEW = "application/vnd.jupyter.widget-view+json"


def bars(figure, K, kind="mean"):
    axes = figure.subplots()
    axes.bar(range(K), range(K))
    axes.set(xlabel="completion", ylabel="reward")
    return f"{kind} of K = {K} <b>"


@pytest.fixture
def explorer():
    return Explorer(bars, K=slider("group size K", 2, 64, 8), kind=choice("baseline", ["mean", "none"]))


def test_moving_a_slider_draws_anew(explorer):
    before = explorer._image.value
    explorer.K.value = 16
    explorer.kind.value = "none"
    assert explorer.values == {"K": 16, "kind": "none"}
    assert repr(explorer) == "none of K = 16 <b>"
    assert len(explorer.figure.axes) == 1
    assert len(explorer.figure.axes[0].patches) == 16
    assert explorer._image.value != before


def ground(figure):
    figure.subplots().set(xlim=(-1, 20), ylim=(0, 20), xlabel="completion", ylabel="reward")


def on_ground(figure, K):
    axes = figure.axes[0]
    axes.bar(range(K), range(K), yerr=1)
    axes.text(2, 15, f"K = {K}")
    return f"K = {K}"


def pixels(picture):
    data = base64.b64decode(picture.partition("base64,")[2].rstrip('">'))
    return imread(io.BytesIO(data), format="png")[..., :3]


def test_what_no_control_changes_is_drawn_once_and_the_rest_anew():
    grounds = []
    explorer = Explorer(on_ground, ground=lambda f: grounds.append(ground(f)), K=slider("K", 2, 19, 8))
    axes = explorer.figure.axes[0]
    for K in (19, 5):
        explorer.K.value = K
        explorer._repr_mimebundle_()  # a sharper picture in between leaves no trace
    assert len(grounds) == 1
    assert explorer.figure.axes == [axes]
    assert [len(kept) for kept in (axes.patches, axes.texts, axes.containers)] == [5, 1, 2]

    ground(fresh := Figure((8.0, 3.4), 80))
    on_ground(fresh, 5)
    expected = pixels(widgets.img_tag(widgets.png(fresh, 80), "", fresh))
    shown = pixels(explorer._image.value)
    assert shown.shape == expected.shape
    differing = abs(shown - expected).max(-1) > 0.02
    assert differing.mean() < 0.002  # the feet of the bars, which stand before the axis and not behind it


def test_another_value_in_a_later_cell_leaves_what_was_shown_alone(explorer):
    shown = explorer._image.value
    later = explorer.at(K=16)
    assert later.values == {"K": 16, "kind": "mean"}
    assert (explorer.values, explorer._image.value) == ({"K": 8, "kind": "mean"}, shown)
    later.kind.value = "none"
    assert explorer.kind.value == "mean"
    assert later.at().values == {"K": 16, "kind": "none"}
    with pytest.raises(KeyError):
        explorer.at(k=16)


def test_a_copy_keeps_its_ground_and_how_often_it_draws():
    explorer = Explorer(on_ground, ground=ground, size=(4, 3), continuous=False, K=slider("K", 2, 19, 8))
    later = explorer.at(K=3)
    assert later.K.continuous_update is False
    assert later.figure.get_size_inches().tolist() == [4, 3]
    assert later.figure.axes[0].get_xlabel() == "completion"


def test_the_words_stand_below_the_picture_too_and_leave_no_trace(explorer):
    def size(text):
        data, _ = Picture(explorer.figure, text)._repr_mimebundle_()
        return imread(io.BytesIO(base64.b64decode(data["image/png"])), format="png").shape

    (one, width, _), (three, _, _), (wrapped, _, _) = size("one"), size("one\ntwo\nthree"), size("word " * 40)
    assert width == 1280
    assert 544 < one < wrapped == three - 26 < three  # a line is 0.163 inches of 160 pixels
    assert not explorer.figure.texts


def documented(x):
    """What it says.

    >>> documented(1)
    [1]
    """
    settings = [
        x,
    ]  # fmt: skip
    return settings


def test_code_is_shown_without_docstrings_and_notes_to_tools():
    assert widgets.show_source(documented).data == (
        "```python\ndef documented(x):\n    settings = [\n        x,\n    ]\n    return settings\n```"
    )
    assert widgets.show_source(documented, documented).data.count("def documented") == 2
    assert "when yours is right" in widgets.show_source(documented, when=[]).data


def test_without_a_kernel_the_picture_and_its_words_are_left(explorer):
    data, settings = explorer._repr_mimebundle_()
    assert data["text/plain"] == "mean of K = 8 <b>"
    assert base64.b64decode(data["image/png"])[:4] == b"\x89PNG"
    assert data[VIEW]["model_id"] == explorer.widget.model_id
    assert settings["image/png"] == {"width": 640, "alt": "mean of K = 8 <b>"}


def test_words_are_text_and_never_markup(explorer):
    assert "<b>" not in explorer._words.value
    assert 'alt="mean of K = 8 &lt;b&gt;"' in explorer._image.value


def test_the_field_of_a_slider_follows_it_and_shows_a_rounded_number():
    row = slider("KL weight β", 0.0, 1.0, 0.25, 0.05)
    field, control, _ = row.children
    assert (field.description, field.value, field.max) == ("KL weight β", 0.25, 1.0)
    assert isinstance(control, ipywidgets.FloatSlider)
    assert isinstance(slider("K", 2, 64, 8).control, ipywidgets.IntSlider)
    control.value = 0.1 + 0.2
    assert field.value == 0.3  # and not 0.30000000000000004
    field.value = 0.75
    assert control.value == row.control.value == 0.75


SPOKEN = """
const row = {querySelector: () => handle}, handle = {ariaValueText: "%s", ariaValueNow: "%s"};
let observed;
globalThis.MutationObserver = class { constructor(say) { observed = say; } observe() {} };
(function () { %s }).call({closest: () => row});
handle.ariaValueText = "%s", handle.ariaValueNow = "%s";
observed();
console.log(JSON.stringify([handle.ariaLabel, handle.ariaValueText]));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js to run the script")
@pytest.mark.parametrize(
    ("row", "at_first", "moved", "spoken"),
    [
        (slider('weight "β"', 0, 1, 0.25, 0.05), "0.25", "0.30000000000000004", ['weight "β"', "0.3"]),
        (slider("K", 2, 9, 3), "3", "4", ["K", "4"]),
        (steps("rate", ["0", "1e-3", "0.3"]), "0", "1.0", ["rate", "1e-3"]),
    ],
    ids=["float", "whole", "steps"],
)
def test_a_screen_reader_hears_the_name_of_a_slider_and_a_rounded_value(row, at_first, moved, spoken):
    tag = row.children[-1].value
    script = html.unescape(re.fullmatch(r'<img alt="" src="data:," onerror="([^"]*)">', tag)[1])
    code = SPOKEN % (at_first, at_first, script, moved, moved)
    printed = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(printed) == spoken


def test_every_slider_tells_a_screen_reader_its_name(run):
    explorer = Explorer(lambda figure, **values: "", a=slider("first", 0, 1, 0), b=steps("second", ["x", "y"]))
    for widget, names in (
        (explorer.widget, ("first", "second")),
        (SampleBrowser(run).widget, ("logged step", "prompt")),
    ):
        rows = widget.children[0].children
        assert all(f'"{name}"' in html.unescape(row.children[-1].value) for name, row in zip(names, rows, strict=True))


def test_steps_are_a_slider_over_words_and_a_list_with_a_name():
    row = steps("β", ["0", "0.02", "2"], "0.02")
    field, control, _ = row.children
    assert (field.description, field.value, field.options) == ("β", "0.02", ("0", "0.02", "2"))
    control.value = "2"
    assert field.value == "2"
    field.value = "0"
    assert control.value == row.control.value == "0"


def test_where_a_redraw_is_slow_it_waits_for_the_end_of_the_drag():
    explorer = Explorer(bars, K=slider("K", 2, 64, 8), continuous=False)
    assert explorer.K.continuous_update is False


def test_a_picture_is_its_words_to_a_test_and_its_figure_to_a_reader(explorer):
    data, _ = Picture(explorer.figure, "reward 0.50")._repr_mimebundle_()
    assert data.keys() == {"text/plain", "image/png"}
    assert data["text/plain"] == repr(Picture(explorer.figure, "reward 0.50")) == "reward 0.50"


# --- a run ----------------------------------------------------------------------------------------------


class Shown:
    """Stands in for the notebook: keeps what was displayed, and each update of it."""

    def __init__(self, what):
        self.states = [what]

    def update(self, what):
        self.states.append(what)


def records(number):
    for step in range(1, number + 1):
        metrics = {"step": step, "reward": step / 10, "kl": None, "completions/mean_length": 6.0}
        row = {"prompt": "3,5,7:22=", "completion": "<3*5+7", "reward": 1.0, "rewards": {}, "advantage": 0.5}
        yield StepRecord(step, metrics, [row] * 16)


@pytest.fixture
def shown(monkeypatch):
    displayed = []

    def display(what, display_id):
        displayed.append(Shown(what))
        return displayed[-1]

    monkeypatch.setattr(widgets, "display", display)
    return displayed


def test_watching_passes_every_record_on_and_ends_with_the_last(shown):
    assert [record.step for record in watch(records(5), 5, seconds=0)] == [1, 2, 3, 4, 5]
    curves, table = shown
    assert len(curves.states) == len(table.states) == 5
    assert repr(curves.states[-1]) == "step 5 of 5: reward 0.500, completions/mean_length 6.000"
    last = table.states[-1].data
    assert "step 5 of 5" in last
    assert last.count("&lt;3*5+7") == 8  # eight rows, and text stays text
    assert "s left" not in last
    assert "s left" in table.states[-2].data


def test_a_group_that_teaches_something_is_shown_first(shown):
    dead, alive = (
        [{"prompt": p, "completion": "1", "reward": 1.0, "advantage": a}] * 8 for p, a in (("1=", 0), ("2=", 1))
    )
    (record,) = records(1)
    list(watch([replace(record, completions=dead + alive)], 1))
    assert shown[1].states[0].data.count("<code>2=") == 8
    list(watch([replace(record, completions=dead * 2)], 1))
    assert shown[3].states[0].data.count("<code>1=") == 8


def test_pictures_are_drawn_now_and_then_but_the_last_one_always(shown):
    assert len(list(watch(records(7), 7, seconds=1000))) == 7
    assert [len(each.states) for each in shown] == [2, 2]
    assert repr(shown[0].states[-1]).startswith("step 7 of 7")


# --- samples --------------------------------------------------------------------------------------------


def logged(step, prompt, completion, reward):
    ids = make_tokenizer()(completion)["input_ids"]
    moved = [-1.0 - 0.5 * i for i in range(len(ids))]
    return {
        "step": step, "prompt": prompt, "completion": completion, "reward": reward, "rewards": {"countdown": reward},
        "advantage": reward - 0.5, "completion_ids": ids, "logprobs": [0.0] * len(ids), "ref_logprobs": moved,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    rows = [
        logged(s, p, c, r) for s in (1, 10) for p in ("3,5,7:22=", "2,4:6=") for c, r in (("3*5+7", 1.0), ("3+5", 0))
    ]
    write(tmp_path, rows)
    return tmp_path


def test_samples_are_browsed_by_step_and_prompt(run):
    browser = SampleBrowser(run)
    assert repr(browser) == "step 10, 3,5,7:22=: 3*5+7 (1.00), 3+5 (0.00)"
    browser.step.value, browser.prompt.value = 1, 2
    assert repr(browser) == "step 1, 2,4:6=: 3*5+7 (1.00), 3+5 (0.00)"
    assert browser.html.count("<tr>") == 3  # the head, and K = 2


def write(folder, rows):
    (folder / "completions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_the_browser_opens_where_right_and_wrong_answers_differ_most(tmp_path):
    rewards = {1: {"a": (1, 0)}, 2: {"dead": (1, 1), "some": (0.5, 0), "most": (0, 1), "too": (1, 0)}, 3: {"b": (1, 1)}}
    write(tmp_path, [logged(s, p, "1", r) for s, prompts in rewards.items() for p, rs in prompts.items() for r in rs])
    browser = SampleBrowser(tmp_path)
    assert repr(browser) == "step 2, most: 1 (0.00), 1 (1.00)"
    assert (browser.step.value, browser.prompt.value) == (2, 3)
    write(tmp_path, [logged(s, "2=", "2", 1) for s in (1, 1, 2, 2)])
    assert repr(SampleBrowser(tmp_path)) == "step 2, 2=: 2 (1.00), 2 (1.00)"  # nothing but dead groups


def test_completions_without_a_reward_are_shown_too(tmp_path):
    nothing = {"reward": None, "advantage": None, "rewards": {}}
    unjudged, judged = logged(1, "1=", "1", 1) | nothing, [logged(1, "2=", "2", r) for r in (0, 1)]
    write(tmp_path, [unjudged, unjudged, *judged, judged[0] | nothing])
    browser = SampleBrowser(tmp_path)
    assert repr(browser) == "step 1, 2=: 2 (0.00), 2 (1.00), 2 (no reward)"
    browser.prompt.value = 1
    assert repr(browser) == "step 1, 1=: 1 (no reward), 1 (no reward)"
    assert "None" not in browser.html


def test_tokens_are_shaded_by_how_far_the_policy_has_moved(run):
    shaded = SampleBrowser(run / "completions.jsonl", make_tokenizer()).html
    assert "title='+1.00 nats'" in shaded
    assert "title='+2.50 nats'" in shaded
    assert shaded.count("<span") == 5 + 3
    assert "<span" not in SampleBrowser(run).html


def test_a_run_without_completions_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no completions in .*logging_steps"):
        SampleBrowser(tmp_path)
