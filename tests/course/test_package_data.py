"""The notebooks and the recorded runs travel with the package: `pip install` is enough for the course."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from grpo_lab.course.notebooks import write_course

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_the_notebooks_are_written_with_their_solutions_if_asked_for(tmp_path):
    assert [path.name for path in write_course(tmp_path / "new" / "course")] == NOTEBOOKS
    written = write_course(tmp_path / "both", solutions=True)
    assert [str(path.relative_to(tmp_path / "both")) for path in written] == [
        *NOTEBOOKS, *(str(Path("solutions", name)) for name in NOTEBOOKS),
    ]  # fmt: skip
    for path in written:
        assert path.read_bytes() == (ROOT / "notebooks" / path.relative_to(tmp_path / "both")).read_bytes()


def test_what_is_there_and_equal_stays(tmp_path):
    write_course(tmp_path)
    (tmp_path / NOTEBOOKS[3]).unlink()
    assert write_course(tmp_path) == [tmp_path / NOTEBOOKS[3]]


def test_a_changed_notebook_is_never_overwritten_and_nothing_else_is_written(tmp_path):
    (tmp_path / NOTEBOOKS[4]).write_text("my work")
    with pytest.raises(FileExistsError, match=rf"other versions of {NOTEBOOKS[4]}\. "):
        write_course(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NOTEBOOKS[4]]
    assert (tmp_path / NOTEBOOKS[4]).read_text() == "my work"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, as a package index would get it."""
    folder = tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, cwd=ROOT)
    (sdist,) = folder.glob("grpo_lab-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "notebooks/solutions/make.py", "runs/K.md", "tests/conftest.py", "constraints.txt"} <= names
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, sdist]
    subprocess.run(command, check=True)
    return next(folder.glob("grpo_lab-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_course_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    data = {name.partition("course/data/")[2] for name in names if "/data/" in name}
    course = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb"), *ROOT.glob("runs/**/*.json*")]
    assert data == {path.relative_to(ROOT).as_posix() for path in course}
    assert all(name.startswith("grpo_lab") for name in names)
    assert wheel.stat().st_size < 10 * 10**6


RUN = """
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from grpo_lab.course.notebooks import write_course

written = write_course(Path("course"))
for path in (written[0], written[4]):
    NotebookClient(nbformat.read(path, 4), timeout=300, resources={"metadata": {"path": "course"}}).execute()
    print(path.stem)
"""


@pytest.mark.slow
def test_the_notebooks_run_where_only_the_wheel_is_installed(tmp_path, wheel):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (python,) = [*tmp_path.glob("venv/bin/python"), *tmp_path.glob("venv/Scripts/python.exe")]
    (site,) = [*tmp_path.glob("venv/lib/python*/site-packages"), *tmp_path.glob("venv/Lib/site-packages")]
    # a plain path: the other packages are seen, and our own, installed there by a link, is not
    (site / "others.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, env=environment)
    result = subprocess.run([python, "-c", RUN], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["00_start_here", "04_group_advantages"]
