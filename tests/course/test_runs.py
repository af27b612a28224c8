"""The recorded runs: complete, small, and each on a card whose words and picture are those of its data."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from grpo_lab.course.recorded import recorded_runs
from grpo_lab.tasks.registry import TASKS
from grpo_lab.training.config import PRESETS

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs"
FOLDERS = sorted(path.parent for path in RUNS.rglob("run.json"))


@pytest.fixture(scope="module")
def cards():
    """benchmarks/cards.py, which stands beside record.py and no package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import cards

        return cards
    finally:
        sys.path.pop(0)


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_folder_is_a_run():
    folders = {path for path in [*RUNS.iterdir(), *(RUNS / "museum").iterdir()] if path.is_dir()}
    assert folders - {RUNS / "museum"} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(RUNS)))
def test_a_run_says_how_it_was_made_what_happened_and_what_was_answered(folder):
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert f"{info['name']}-seed{info['seed']}" == str(folder.relative_to(RUNS))
    assert info["command"].startswith("python benchmarks/")
    assert info["command"].endswith(f" {info['name'].removeprefix('museum/')}")
    assert "cpu" in info["device"]
    assert {"python", "torch", "transformers"} <= info["versions"].keys()
    assert 0 <= info["after"]["eval/pass@1"] <= 1
    if folder.parent.name == "museum":  # made before these were kept, as runs/README.md says
        assert info["changed"]
    else:
        assert len(info["commit"]) >= 7
        assert info["config"]["seed"] == info["seed"]
        changed = json.loads(json.dumps(info["changed"]))
        assert {name: info["config"][name] for name in changed} == changed
    steps = [row["step"] for row in rows_of(folder / "metrics.jsonl")]
    assert steps == list(range(1, info["changed"].get("max_steps", PRESETS["pocket"]["max_steps"]) + 1))
    assert all(isinstance(row["reward"], float) for row in rows_of(folder / "metrics.jsonl"))
    completions = rows_of(folder / "completions.jsonl")
    assert all({"step", "prompt", "completion", "reward", "advantage"} <= row.keys() for row in completions)
    assert len({row["step"] for row in completions}) >= 3


def test_the_runs_that_are_needed_are_there_in_their_seeds():
    three = [f"K-{K}" for K in (2, 4, 16, 32)] + [f"beta-{beta}" for beta in (0, 0.1, 0.5, 2)]
    three += [f"preset-{name}" for name in PRESETS if name not in TASKS]
    wanted = {"pocket": 5, **dict.fromkeys(three, 3)}
    wanted |= {f"collapse-{kind}": 1 for kind in ("hacked-reward", "learning-rate", "wrong-sign-kl")}
    assert {name: len(recorded_runs(name, RUNS)) for name in wanted} == wanted


def test_runs_stay_small():
    sizes = [file.stat().st_size for file in RUNS.rglob("*") if file.is_file()]
    assert sum(sizes) < 6e6


def test_every_run_is_on_a_card(cards):
    shown = {f"{name}-seed{run.info['seed']}" for card in cards.CARDS.values()
             for label, name in card.members.items() for run in cards.read(card)[label]}  # fmt: skip
    assert shown == {str(folder.relative_to(RUNS)) for folder in FOLDERS}
    assert {path.stem for path in RUNS.glob("*.md")} == {"README", *cards.CARDS}
    assert {path.stem for path in RUNS.glob("*.png")} == set(cards.CARDS)


def test_words_and_pictures_are_those_of_the_data(cards):
    assert (RUNS / "README.md").read_text(encoding="utf-8") == cards.index()
    for name, card in cards.CARDS.items():
        runs = cards.read(card)
        text = (RUNS / f"{name}.md").read_text(encoding="utf-8")
        assert text == cards.page(name, card, runs), f"{name}.md is old: python benchmarks/cards.py"
        assert 2 <= len(card.seen) <= 5
        assert "recorded" in text
        picture = (RUNS / f"{name}.png").read_bytes()
        assert len(picture) < 80_000
        assert Image.open(io.BytesIO(picture)).text["Source"] == cards.checksum(card, runs), f"{name}.png is old"


def test_a_picture_says_that_it_is_recorded_and_what_was_drawn(cards):
    card = cards.CARDS["K"]
    runs = cards.read(card)
    drawn = cards.draw(card, runs)
    assert "3 to 5 seeds" in drawn.get_suptitle()
    assert "recorded 2026-11-22 on cpu" in drawn.get_suptitle()
    assert [panel.get_ylabel() for panel in drawn.axes] == list(card.metrics)
    museum = cards.draw(cards.CARDS["museum"], cards.read(cards.CARDS["museum"]))
    assert [panel.get_title() for panel in museum.axes] == [f"exhibit {letter}" for letter in "ABCDEFGHIJKL"]


def test_a_sentence_that_is_no_longer_true_is_refused(cards):
    card = cards.CARDS["beta"]
    runs = cards.read(card)
    exchanged = dict(zip(runs, reversed(runs.values()), strict=True))
    with pytest.raises(ValueError, match=r"no longer what one sees; look at the runs and write anew: The stronger"):
        cards.sentences(card, exchanged)


def test_statistics_by_hand(cards):
    def run(after, rewards):
        metrics = [{"step": i, "reward": reward} for i, reward in enumerate(rewards, 1)]
        return cards.RecordedRun({"after": {"eval/pass@1": after}}, metrics, [])

    flat, rising = [0.5] * 40, [0.0] * 20 + [1.0] * 20
    (r,) = cards.statistics({"a": [run(0.4, flat), run(0.8, rising)]}).values()
    assert (r["after"], r["lowest"], r["highest"]) == (pytest.approx(0.6), 0.4, 0.8)
    assert (r["reward at first"], r["reward half way"], r["reward at last"]) == (0.25, 0.25, 0.75)
    assert (r["reward at most"], r["reward at odd steps"]) == (1.0, 0.5)
    assert r["reward spread"] == pytest.approx((1.0 - 0.5) / 0.75)
    assert "before" not in r
