"""Run notebooks in the Python that runs this script; an error or anything on stderr in a cell is a failure.

    python .ci/run_notebooks.py notebooks/00_start_here.ipynb ...

Needs nothing but what JupyterLab brings, so that an environment is tested without the packages that the tests add.
The notebooks are not changed.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def complaints(path: Path) -> list[str]:
    """Run one notebook in its folder; return its error, or the texts that its cells wrote to stderr."""
    notebook = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    except CellExecutionError as error:
        return [str(error)]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.get("name") == "stderr"]


if __name__ == "__main__":
    failed = 0
    for name in sys.argv[1:]:
        said = complaints(Path(name).resolve())
        print(f"{name}: {'failed' if said else 'passed'}", *said, sep="\n", flush=True)
        failed += bool(said)
    sys.exit(f"{failed} of {len(sys.argv) - 1} notebooks failed" if failed else 0)
