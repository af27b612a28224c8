"""The notebooks as they are committed: run, in order, clean, without solutions, with badges that lead to themselves.

That their outputs are right is nbval's business: `pytest --nbval notebooks` (see the Makefile).
"""

import ast
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
SOLVED = sorted((FOLDER / "solutions").glob("*.ipynb"))
LEARNERS = sorted(FOLDER.glob("*.ipynb"))
sys.path.append(str(FOLDER / "solutions"))
import make  # noqa: E402

each = pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
either = pytest.mark.parametrize("path", [*LEARNERS, *SOLVED], ids=lambda path: str(path.relative_to(FOLDER)))
REPOSITORY = re.search(r"mybinder\.org/v2/gh/([\w.-]+/[\w.-]+)/", (ROOT / "README.md").read_text(encoding="utf-8"))[1]


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_there_are_twelve_in_order_and_each_has_its_solution():
    assert [path.name[:2] for path in LEARNERS] == [f"{number:02}" for number in range(12)]
    assert [path.name for path in LEARNERS] == [path.name for path in SOLVED]


@either
def test_it_was_run_from_top_to_bottom_and_nothing_complained(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    assert notebook.metadata.kernelspec.name == "python3"


@either
def test_what_is_saved_is_small_and_the_same_on_every_machine(path):
    notebook = nbformat.read(path, 4)
    assert path.stat().st_size < 1_500_000
    assert "widgets" not in notebook.metadata  # GitHub refuses Colab's variant of it
    text = path.read_text(encoding="utf-8")
    assert "widget-view" not in text
    assert not re.search(r"/home/|/root/|/Users/|/tmp/", "".join(re.findall(r'"text(?:/plain)?": \[[^\]]*\]', text)))


@either
def test_there_is_a_picture_and_the_last_output_shows_something(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert code_cells(path)[-1].outputs


@each
def test_the_learners_notebook_is_the_solved_one_without_its_solutions(path):
    solved = nbformat.read(FOLDER / "solutions" / path.name, 4)
    assert [cell.source for cell in nbformat.read(path, 4).cells] == [
        cell.source for cell in make.for_learners(solved).cells
    ]


@each
def test_no_solution_is_left_for_the_learner_to_see(path):
    text = path.read_text(encoding="utf-8")
    assert "SOLUTION" not in text
    solved = (FOLDER / "solutions" / path.name).read_text(encoding="utf-8")
    for body in re.findall(r"### BEGIN SOLUTION\\n(.*?)### END SOLUTION", solved, re.DOTALL):
        lines = [line for line in re.findall(r'"\s*(.*?)(?:\\n)?",?$', body, re.MULTILINE) if len(line) > 30]
        assert not [line for line in lines if line in text]


@each
def test_exercises_are_to_do_for_the_learner_and_right_in_the_solution(path):
    def verdicts(where):
        texts = [o.get("data", {}).get("text/plain", "") for cell in code_cells(where) for o in cell.outputs]
        return [re.match(r"\[(.+?)\]", text)[1] for text in texts if re.match(r"\[(ok|to do|not yet)\]", text)]

    assert set(verdicts(path)) <= {"to do"}
    assert set(verdicts(FOLDER / "solutions" / path.name)) <= {"ok"}
    assert len(verdicts(path)) == len(verdicts(FOLDER / "solutions" / path.name))
    if path.name[:2] != "00":
        assert verdicts(path)


@each
def test_the_first_cell_says_what_is_asked_how_long_and_where_else_it_runs(path):
    first, setup = nbformat.read(path, 4).cells[:2]
    assert first.source.startswith(f"# {path.name[:2]} · ")
    assert f"https://mybinder.org/v2/gh/{REPOSITORY}/main?urlpath=lab/tree/notebooks/{path.name})" in first.source
    assert f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name})" in first.source
    assert re.search(r"^\*\*.+\?\*\*$", first.source, re.MULTILINE)  # the question
    assert re.search(r"^\*\d+ minutes · [●○]{3} · ", first.source, re.MULTILINE)
    assert f"https://github.com/{REPOSITORY} /content/course" in setup.source


def test_each_leads_to_the_previous_and_the_next():
    for before, after in pairwise(LEARNERS):
        for cell in (0, -1):
            assert f"]({after.name})" in nbformat.read(before, 4).cells[cell].source, (before.name, cell)
            assert f"]({before.name})" in nbformat.read(after, 4).cells[cell].source, (after.name, cell)


@each
def test_it_ends_with_what_the_learner_now_owns(path):
    assert "**What you now own:**" in nbformat.read(path, 4).cells[-1].source


@each
def test_nothing_is_shown_that_nbval_cannot_compare(path):
    for cell in code_cells(path):
        assert not cell.source.rstrip().endswith(";")
        assert "interact(" not in cell.source
        assert "clear_output" not in cell.source


def test_a_stub_is_what_is_left_of_a_solution():
    source = (
        "def f(x):\n    '''Doc.'''\n    ### BEGIN SOLUTION\n    y = x\n    return y\n    ### END SOLUTION\n\n\nf(1)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    (cell,) = make.for_learners(notebook).cells
    assert cell.source == "def f(x):\n    '''Doc.'''\n    ...  # your code here\n\n\nf(1)"
    ast.parse(cell.source)


def test_a_fork_is_one_command_away(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    for path in (ROOT / "README.md", *LEARNERS, *SOLVED):
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    monkeypatch.setattr(make, "FOLDER", tmp_path / "notebooks")
    make.retarget("someone/a-fork")
    for path in (tmp_path / "README.md", *(tmp_path / "notebooks").rglob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        assert REPOSITORY not in text, path
        assert "gh/someone/a-fork/" in text, path
    make.retarget(REPOSITORY)
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


@pytest.mark.slow
def test_on_colab_the_first_cell_installs_the_course_and_leaves_everything_else_alone(tmp_path):
    """Its commands in a new environment that has, like Colab, all other packages already."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    here = Path(next(p for p in sys.path if p.endswith("site-packages")))
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "colab.pth").write_text(str(here))  # a plain path: our own package, installed here by a link, stays unseen

    def run(*arguments, **settings):
        return subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=tmp_path, **settings).stdout

    before = run(python, "-m", "pip", "freeze")
    cell = code_cells(FOLDER / "00_start_here.ipynb")[0].source
    for line in re.findall(r"^    [!%](.+)$", cell, re.MULTILINE):
        line = line.replace("/content/course", str(tmp_path / "course"))
        line = line.replace(f"https://github.com/{REPOSITORY}", ROOT.as_uri())
        if not line.startswith("cd "):
            run("bash", "-c", line.replace("pip ", f"{python} -m pip "))
    assert run(python, "-c", "import grpo_lab.course.widgets; print(grpo_lab.__file__)").startswith(str(site))
    assert (tmp_path / "course" / "notebooks" / "00_start_here.ipynb").is_file()
    after = run(python, "-m", "pip", "freeze")
    changed = set(before.splitlines()) ^ set(after.splitlines())
    assert all("grpo" in line or line.startswith("-e ") for line in changed), changed  # the link to this very package
