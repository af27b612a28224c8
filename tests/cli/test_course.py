"""`grpo-lab course`: the notebooks are copied, a learner's own are kept, and JupyterLab starts in their folder."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_lab.cli import main as cli


@pytest.fixture
def course(tmp_path, monkeypatch, capsys):
    """Run `grpo-lab course` with one notebook and its solution: (exit status, output, complaint)."""

    def write_course(folder: Path, solutions: bool) -> list[Path]:
        paths = [folder / "00.ipynb", *([folder / "solutions" / "00.ipynb"] if solutions else ())]
        if (folder / "00.ipynb").exists():
            raise FileExistsError(f"{folder} has other versions of 00.ipynb. Name another folder, or move them.")
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return paths

    monkeypatch.setitem(sys.modules, "grpo_lab.course.notebooks", SimpleNamespace(write_course=write_course))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["course", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def jupyterlab(monkeypatch):
    """Stand in for JupyterLab: the list of (command, folder) with which it was started; it ends with status 3."""
    started = []

    class Process:
        def __init__(self, command, cwd):
            started.append((command, cwd))
            self.interrupts = 2

        def wait(self):
            self.interrupts -= 1
            if self.interrupts >= 0:
                raise KeyboardInterrupt
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return started


def test_the_notebooks_are_copied_and_the_next_command_is_named(course):
    assert course("here") == (0, "Written to here: 1 notebooks\nOpen them: grpo-lab course here --open\n", "")
    assert Path("here/00.ipynb").exists()
    assert not Path("here/solutions").exists()


def test_without_a_folder_there_is_a_default_and_solutions_are_asked_for(course):
    assert course("--solutions")[0] == 0
    assert Path("grpo-lab-course/solutions/00.ipynb").exists()


def test_changed_notebooks_are_not_replaced(course):
    course("here")
    assert course("here") == (
        2, "", "grpo-lab: here has other versions of 00.ipynb. Name another folder, or move them.\n",
    )  # fmt: skip


def test_open_starts_jupyterlab_in_the_folder_and_leaves_ctrl_c_to_it(course, jupyterlab):
    status, out, _ = course("here", "--open")
    assert (status, out) == (3, "Written to here: 1 notebooks\n")
    assert jupyterlab == [([sys.executable, "-m", "jupyterlab"], Path("here"))]


def test_open_opens_changed_notebooks_as_they_are(course, jupyterlab):
    course("here")
    Path("here/00.ipynb").write_text("my work")
    status, out, _ = course("here", "--open")
    assert (status, out) == (3, "Written to here: nothing, because it holds notebooks that were changed\n")
    assert Path("here/00.ipynb").read_text() == "my work"
    assert len(jupyterlab) == 1


def test_without_jupyterlab_nothing_is_written_and_the_cure_is_named(course, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert course("here", "--open") == (2, "", "grpo-lab: --open needs JupyterLab: pip install 'grpo-lab[lab]'\n")
    assert not Path("here").exists()


@pytest.mark.parametrize(
    ("folder", "message"),
    [("", "FOLDER is empty"), ("file", "file is a file"), ("file/x", "Not a directory"), ("a\0b", "null byte"),
     ("x" * 5000, "File name too long")],
    ids=ascii,
)  # fmt: skip
def test_a_folder_that_cannot_be_gets_one_sentence(course, folder, message):
    Path("file").write_text("in the way")
    status, _, complaint = course(folder)
    assert status == 2
    assert message in complaint
    assert complaint.count("\n") == 1
    assert Path("file").read_text() == "in the way"
