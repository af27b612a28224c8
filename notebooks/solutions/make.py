"""Make the learner's notebooks from the solved ones, with their outputs.

    python notebooks/solutions/make.py           all of them
    python notebooks/solutions/make.py 04 05     these
    python notebooks/solutions/make.py --badges OWNER/NAME      point every badge and install line at a fork

NN_name.ipynb in this folder is what one edits. It is run from top to bottom; then everything between
`### BEGIN SOLUTION` and `### END SOLUTION` is cut out, and what is left is run as well and becomes the
one in the folder above. Both keep their outputs and nothing that differs from machine to machine.
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


def for_learners(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without its solutions; cells that were one are left to be written."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = SOLUTION.sub(r"\1...  # your code here", cell.source)
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
    """Run a solved notebook, and make the learner's from it."""
    solved = run(nbformat.read(path, 4))
    nbformat.write(solved, path)
    nbformat.write(run(for_learners(solved)), FOLDER / path.name)


def retarget(repository: str) -> None:
    """Point every badge and install line at another repository, given as owner/name."""
    readme = FOLDER.parent / "README.md"
    now = re.search(r"mybinder\.org/v2/gh/([\w.-]+/[\w.-]+)/", readme.read_text(encoding="utf-8"))[1]
    for path in [readme, *FOLDER.rglob("*.ipynb")]:
        path.write_text(path.read_text(encoding="utf-8").replace(now, repository), encoding="utf-8")


def main() -> None:
    """Make what is asked for; stops at the first cell that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NN")
    parser.add_argument("--badges", metavar="OWNER/NAME")
    options = parser.parse_args()
    if options.badges:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.badges):
            parser.error(f"a repository is OWNER/NAME, got {options.badges!r}")
        retarget(options.badges)
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
