"""Run the solved notebooks, and make the learner's from them.

    python notebooks/solutions/make.py           all of them
    python notebooks/solutions/make.py 04 05     these
    python notebooks/solutions/make.py --badges owner/name      set the address of the repository on GitHub

NN_name.ipynb in this folder is what one edits. It is run from top to bottom and keeps its outputs, without what
differs from machine to machine. The one in the folder above is the same without outputs, and without what stands
between `### BEGIN SOLUTION` and `### END SOLUTION` or `### BEGIN HIDDEN TESTS` and `### END HIDDEN TESTS`. These marks
and the cells' metadata are nbgrader's: `nbgrader generate_assignment` takes the solved notebooks as they are.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SOLVED = Path(__file__).parent
FOLDER = SOLVED.parent
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION[ \t]*$", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"^### BEGIN HIDDEN TESTS\n.*?^### END HIDDEN TESTS\n", re.MULTILINE | re.DOTALL)

OLD_BADGES = re.compile(r"(?:^\[!\[(?:Binder|Colab)\].*\n)+\n", re.MULTILINE)
BADGES = """\
[![Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/notebooks/{name})
[![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name})

"""
# the first code cell of every notebook
INSTALL = """\
import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # owner/name on GitHub
if not importlib.util.find_spec("grpo_lab"):  # on Colab, say
    found = [p for folder in (Path.cwd(), Path("/content")) for p in folder.glob("grpo[-_]lab*")]
    files = sorted(str(p) for p in found if p.suffix in (".whl", ".zip"))
    address = [f"git+https://github.com/{REPOSITORY}"] if REPOSITORY else []
    if not files + address:
        raise RuntimeError(
            "Put grpo_lab-*.whl beside this notebook (on Colab: the folder icon on the left), then run this cell again."
        )
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", (files[-1:] + address)[0]]
    subprocess.run(install, check=True)
    importlib.invalidate_caches()
if "google.colab" in sys.modules:
    from grpo_lab.course.notebooks import prepare_colab

    prepare_colab()"""


def for_learners(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without solutions, without the tests that only graders run, and without outputs."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = HIDDEN.sub("", SOLUTION.sub(r"\1...  # your code here", cell.source))
            cell.outputs, cell.execution_count = [], None
    return notebook


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, and without what would differ on another machine."""
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    notebook.metadata.pop("widgets", None)  # GitHub refuses it
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            # a view without its kernel shows nothing but an error; the picture beside it says all
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return notebook


def make(path: Path) -> None:
    """Run a solved notebook, and write the learner's."""
    solved = run(nbformat.read(path, 4))
    nbformat.write(solved, path)
    nbformat.write(for_learners(solved), FOLDER / path.name)


def with_badges(text: str, repository: str, name: str = "00_start_here.ipynb") -> str:
    """Return a Markdown text with the badges of a notebook under its title, or without any if repository is ""."""
    title, rest = OLD_BADGES.sub("", text).split("\n\n", 1)
    badges = BADGES.format(repository=repository, name=name) if repository else ""
    return f"{title}\n\n{badges}{rest}"


def set_repository(repository: str) -> None:
    """Write the address (owner/name) into the install cell of every notebook, and the badges; "" removes both."""
    readme = FOLDER.parent / "README.md"
    readme.write_text(with_badges(readme.read_text(encoding="utf-8"), repository), encoding="utf-8")
    for path in FOLDER.rglob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        title, install = notebook.cells[:2]
        title.source = with_badges(title.source, repository, path.name)
        install.source = INSTALL.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
        install.metadata["tags"] = ["hide-input"]
        nbformat.write(notebook, path)


def main() -> None:
    """Make what is asked for; stops at the first cell that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NN")
    parser.add_argument("--badges", metavar="owner/name")
    options = parser.parse_args()
    if options.badges is not None:
        if not re.fullmatch(r"([\w.-]+/[\w.-]+)?", options.badges):
            parser.error(f"a repository is owner/name, got {options.badges!r}")
        set_repository(options.badges)
        return
    for path in sorted(SOLVED.glob("*.ipynb")):
        if not options.names or path.name.startswith(tuple(options.names)):
            print(path.stem, flush=True)
            try:
                make(path)
            except CellExecutionError as error:
                sys.exit(str(error))


if __name__ == "__main__":
    main()
