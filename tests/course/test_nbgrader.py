"""nbgrader releases, collects and grades the solved notebooks as they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("nbgrader")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of nbgrader's own packages
from nbgrader.api import Gradebook  # noqa: E402

SOLVED = Path(__file__).parents[2] / "notebooks" / "solutions"
NAMES = ["01_policy_gradient.ipynb", "04_group_advantages.ipynb"]


def solutions(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.metadata.get("nbgrader", {}).get("solution")]
    return {cell.metadata.nbgrader.grade_id: cell.source for cell in cells}


def test_a_solution_gets_all_points_and_what_was_handed_out_gets_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # nbgrader calls alembic

    def nbgrader(*arguments):
        command = [sys.executable, "-m", "nbgrader", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]

    shutil.copy(SOLVED / "nbgrader_config.py", tmp_path)
    (tmp_path / "source" / "course").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(SOLVED / name, tmp_path / "source" / "course")
    nbgrader("generate_assignment", "course")

    for student in ("stub", "solved"):
        shutil.copytree(tmp_path / "release" / "course", tmp_path / "submitted" / student / "course")
    for name in NAMES:
        released = tmp_path / "submitted" / "solved" / "course" / name
        text = released.read_text(encoding="utf-8")
        assert "SOLUTION" not in text
        assert "HIDDEN" not in text
        notebook, answers = nbformat.read(released, 4), solutions(SOLVED / name)
        assert answers.keys() == solutions(released).keys()
        for cell in notebook.cells:
            cell.source = answers.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
        nbformat.write(notebook, released)
    nbgrader("autograde", "course")

    exercises = sum(len(solutions(SOLVED / name)) for name in NAMES)
    with Gradebook(f"sqlite:///{tmp_path}/gradebook.db") as book:
        scores = {student: book.find_submission("course", student).score for student in ("stub", "solved")}
        assert book.find_assignment("course").max_score == exercises
    assert scores == {"stub": 0, "solved": exercises}
