"""Progress: a bar where somebody watches, plain lines in a file."""

import sys

import pytest

from grpo_lab.training.progress import LINES, Progress


def shown(capsys, *, terminal, silent=False, total=40, done=0):
    with Progress(total, silent=silent) as bar:
        assert bar.bar.disable == (silent or not terminal)
        bar.start(done)
        for step in range(done + 1, total + 1):
            bar.show(step, f"reward {step / total}")
        bar.write("a message")
    return capsys.readouterr()


def test_a_file_gets_a_line_for_every_twentieth_of_the_run(capsys):
    found = shown(capsys, terminal=False)
    assert found.err.splitlines() == [f"Step {n} of 40: reward {n / 40}" for n in range(2, 41, 2)]
    assert len(found.err.splitlines()) == LINES
    assert "\r" not in found.err
    assert found.out == "a message\n"


def test_a_short_and_a_resumed_run_show_every_step_that_they_make(capsys):
    assert shown(capsys, terminal=False, total=3).err.count("Step ") == 3
    assert shown(capsys, terminal=False, total=39).err.count("Step ") == LINES
    assert shown(capsys, terminal=False, done=36).err.splitlines()[0].startswith("Step 38 of 40")


@pytest.mark.parametrize("terminal", [False, True])
def test_other_processes_show_nothing(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert shown(capsys, terminal=terminal, silent=True) == ("", "")


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    found = shown(capsys, terminal=True)
    assert "40/40" in found.err
    assert "Step " not in found.err
