"""The notebooks as they are committed: run, in order, clean, without solutions; and the cell that installs on Colab.

That their outputs are right is nbval's business: `pytest --nbval notebooks` (see the Makefile).
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbconvert import PythonExporter

from grpo_lab.course import notebooks

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
SOLVED = sorted((FOLDER / "solutions").glob("*.ipynb"))
LEARNERS = sorted(FOLDER.glob("*.ipynb"))
sys.path.append(str(FOLDER / "solutions"))
import make  # noqa: E402

each = pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
solved = pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
either = pytest.mark.parametrize("path", [*LEARNERS, *SOLVED], ids=lambda path: str(path.relative_to(FOLDER)))


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_there_are_twelve_in_order_and_each_has_its_solution():
    assert [path.name[:2] for path in LEARNERS] == [f"{number:02}" for number in range(12)]
    assert [path.name for path in LEARNERS] == [path.name for path in SOLVED]


@solved
def test_it_was_run_from_top_to_bottom_and_nothing_complained(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    assert notebook.metadata.kernelspec.name == "python3"


@each
def test_the_learners_notebook_holds_no_outputs_and_so_no_answers(path):
    nbformat.validate(nbformat.read(path, 4))
    assert path.stat().st_size < 100_000
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@either
def test_what_is_saved_is_small_and_the_same_on_every_machine(path):
    notebook = nbformat.read(path, 4)
    assert path.stat().st_size < 1_500_000
    assert "widgets" not in notebook.metadata  # GitHub refuses Colab's variant of it
    text = path.read_text(encoding="utf-8")
    assert "widget-view" not in text
    assert not re.search(r"/home/|/root/|/Users/|/tmp/", "".join(re.findall(r'"text(?:/plain)?": \[[^\]]*\]', text)))


@solved
def test_there_is_a_picture_and_the_last_output_shows_something(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert code_cells(path)[-1].outputs


@each
def test_the_learners_notebook_is_the_solved_one_without_its_solutions(path):
    assert nbformat.read(path, 4) == make.for_learners(nbformat.read(FOLDER / "solutions" / path.name, 4))


@each
def test_no_solution_is_left_for_the_learner_to_see(path):
    text = path.read_text(encoding="utf-8")
    assert "SOLUTION" not in text
    assert "HIDDEN" not in text
    solved = (FOLDER / "solutions" / path.name).read_text(encoding="utf-8")
    for body in re.findall(r"### BEGIN SOLUTION\\n(.*?)### END SOLUTION", solved, re.DOTALL):
        lines = [line for line in re.findall(r'"\s*(.*?)(?:\\n)?",?$', body, re.MULTILINE) if len(line) > 30]
        assert not [line for line in lines if line in text]


def exercises(path):
    """The cells of each exercise, as nbgrader's metadata say: the one to write, and the one that judges it."""
    cells = [cell for cell in code_cells(path) if "nbgrader" in cell.metadata]
    return list(zip(cells[::2], cells[1::2], strict=True))


@solved
def test_each_exercise_is_a_cell_for_the_learner_and_a_locked_one_with_points_after_it(path):
    assert bool(exercises(path)) == (path.stem != "00_start_here")
    ids = []
    for write, judge in exercises(path):
        written, judged = write.metadata.nbgrader, judge.metadata.nbgrader
        assert (written.solution, written.grade, written.locked) == (True, False, False)
        assert (judged.solution, judged.grade, judged.locked, judged.points) == (False, True, True, 1)
        assert write.source.rstrip().endswith("### END SOLUTION")
        assert re.search(r"### BEGIN HIDDEN TESTS\nassert .+\n### END HIDDEN TESTS\n.+", judge.source)
        assert written.schema_version == judged.schema_version == 3
        ids += [written.grade_id, judged.grade_id]
    assert len(set(ids)) == len(ids)
    assert sum("SOLUTION" in cell.source for cell in code_cells(path)) == len(exercises(path))


@solved
def test_the_saved_verdicts_are_ok(path):
    for _, judge in exercises(path):
        ((kind, text),) = [(o.output_type, o.get("text") or o.data["text/plain"]) for o in judge.outputs]
        assert text.startswith("[ok] " if kind == "execute_result" else "right"), text


@each
def test_an_exercise_that_is_not_written_is_to_do_and_stops_nothing(path):
    imports, names = code_cells(path)[1].source, {}
    exec(imports, names)
    for write, judge in exercises(path):
        exec(write.source, names)
        exec(judge.source, names)
        if "verdict" in judge.source:
            assert repr(names["verdict"]).startswith("[to do] ")
        else:
            assert names["differ"]


@each
def test_the_first_cell_says_what_is_asked_and_how_long_and_the_second_installs_on_colab(path):
    first, setup = nbformat.read(path, 4).cells[:2]
    assert setup.source == make.INSTALL
    assert setup.metadata.tags == ["hide-input"]
    assert first.source.startswith(f"# {path.name[:2]} · ")
    assert re.search(r"^\*\*.+\?\*\*$", first.source, re.MULTILINE)  # the question
    assert re.search(r"^\*\d+ minutes · [●○]{3} · ", first.source, re.MULTILINE)


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
    solution = "def f(x):\n    '''Doc.'''\n    ### BEGIN SOLUTION\n    y = x\n    return y\n    ### END SOLUTION"
    judge = "verdict = f(1)\n### BEGIN HIDDEN TESTS\nassert verdict\n### END HIDDEN TESTS\nverdict"
    cells = [nbformat.v4.new_code_cell(source, execution_count=1) for source in (solution, judge)]
    cells[1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=1)]
    stub, verdict = make.for_learners(nbformat.v4.new_notebook(cells=cells)).cells
    assert stub.source == "def f(x):\n    '''Doc.'''\n    ...  # your code here"
    ast.parse(stub.source)
    assert verdict.source == "verdict = f(1)\nverdict"
    assert verdict.outputs == []


@either
def test_it_is_plain_python_when_exported_as_a_script(path):
    source, _ = PythonExporter().from_filename(path)
    ast.parse(source)


def test_the_repository_is_set_and_removed_with_one_command(tmp_path, monkeypatch):
    copies = [tmp_path / path.relative_to(ROOT) for path in (ROOT / "README.md", *LEARNERS, *SOLVED)]
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    for copy in copies:
        copy.write_bytes((ROOT / copy.relative_to(tmp_path)).read_bytes())
        assert not re.search(r"OWNER|mybinder\.org/v2|colab\.research", copy.read_text(encoding="utf-8")), copy
    monkeypatch.setattr(make, "FOLDER", tmp_path / "notebooks")
    for _ in range(2):  # the second time nothing is there twice
        make.set_repository("someone/a-fork")
        for copy in copies:
            text = copy.read_text(encoding="utf-8")
            notebook = copy.name if copy.suffix == ".ipynb" else "00_start_here.ipynb"
            assert text.count("mybinder.org/v2/gh/someone/a-fork/main?urlpath=lab/tree/notebooks/" + notebook) == 1
            assert text.count("com/github/someone/a-fork/blob/main/notebooks/" + notebook) == 1
            assert copy.suffix != ".ipynb" or 'REPOSITORY = \\"someone/a-fork\\"' in text
    make.set_repository("")
    for copy in copies:
        assert copy.read_bytes() == (ROOT / copy.relative_to(tmp_path)).read_bytes(), copy


def on_colab(folder, *python, repository="", **environment):
    """Run the install cell in a folder, with a stand-in for Colab's module, and then say where the package is."""
    cell = make.INSTALL.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
    code = f"import sys, types\nsys.modules['google.colab'] = types.ModuleType('colab')\n{cell}\n"
    code += "import grpo_lab\nprint(grpo_lab.__file__)"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [*(python or [sys.executable]), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=inherited | environment)


def test_on_colab_the_cell_goes_on_where_the_package_is_there(tmp_path):
    result = on_colab(tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "grpo_lab" / "__init__.py"


def test_on_colab_the_cell_fails_and_says_what_to_do_where_nothing_is_there(tmp_path):
    result = on_colab(tmp_path, sys.executable, "-S")  # -S: no installed package is seen
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("RuntimeError: Put grpo_lab-*.whl")


def test_the_oldest_versions_are_those_of_the_package():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert all(f"{name}>={oldest}" in dependencies for name, oldest in notebooks.OLDEST.items())


def test_a_colab_with_old_versions_is_refused(monkeypatch):
    monkeypatch.setattr(notebooks, "version", {"torch": "2.10.1+cu128", "transformers": "5.15.0"}.get)
    with pytest.raises(RuntimeError, match=r"torch 2\.10\.1\+cu128, .* 'torch>=2\.11' 'transformers>=5\.15'"):
        notebooks.prepare_colab()


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """The Python of a new environment that has, like Colab, all packages but ours, and where it keeps new ones."""
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = [*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")]
    here = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "colab.pth").write_text(here)  # a plain path: our own package, installed here by a link, stays unseen
    return next(iter([*folder.glob("bin/python"), *folder.glob("Scripts/python.exe")])), site


@pytest.fixture
def packages(colab):
    """Which packages the test added to the environment, which has an old torchao, or removed."""
    _, site = colab
    info = site / "torchao-0.10.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    (info / "RECORD").write_text("torchao-0.10.0.dist-info/METADATA,,\ntorchao-0.10.0.dist-info/RECORD,,\n")

    def listed():
        return {path.stem.partition("-")[0] for path in site.glob("*.dist-info")}

    before = listed()
    yield lambda: listed() ^ before
    for path in site.glob("grpo_lab*"):
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("grpo_lab-*.whl"))


@pytest.mark.slow
def test_on_colab_the_cell_installs_the_wheel_beside_it_and_leaves_everything_else_alone(
    tmp_path, colab, wheel, packages
):
    shutil.copy(wheel, tmp_path)
    result = on_colab(tmp_path, colab[0])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Uninstalling torchao 0.10.0: ")
    assert Path(result.stdout.splitlines()[-1]) == colab[1] / "grpo_lab" / "__init__.py"
    assert packages() == {"grpo_lab", "torchao"}


@pytest.mark.slow
def test_on_colab_the_cell_installs_a_zip_of_the_repository(tmp_path, colab, packages):
    subprocess.run(
        ["git", "archive", "--prefix=grpo-lab-main/", "-o", tmp_path / "grpo-lab-main.zip", "HEAD"],
        check=True, cwd=ROOT,
    )  # fmt: skip
    result = on_colab(tmp_path, colab[0])
    assert result.returncode == 0, result.stderr
    assert "grpo_lab" in packages()


@pytest.mark.slow
def test_on_colab_the_cell_clones_the_repository_or_fails(tmp_path, colab, packages):
    elsewhere = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": "https://github.com/someone/a-fork"}
    for address, code in (f"{tmp_path.as_uri()}/none", 1), (ROOT.as_uri(), 0):
        elsewhere["GIT_CONFIG_KEY_0"] = f"url.{address}.insteadOf"
        result = on_colab(tmp_path, colab[0], repository="someone/a-fork", **elsewhere)
        assert result.returncode == code, result.stderr
        assert ("CalledProcessError" in result.stderr) == bool(code)
        assert packages() - {"torchao"} == ({"grpo_lab"} if code == 0 else set())
