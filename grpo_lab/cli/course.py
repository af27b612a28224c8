"""`grpo-lab course`: copy the notebooks of the course into a folder, and open them in JupyterLab."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "course",
        help="copy the notebooks of the course into a folder",
        description="Copy the notebooks of the course into a folder. Notebooks that you have changed are not replaced.",
    )
    parser.add_argument("folder", nargs="?", default="grpo-lab-course", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--solutions", action="store_true", help="also copy the solved notebooks")
    parser.add_argument("--open", action="store_true", help="open the folder in JupyterLab")
    return parser


def run(options: argparse.Namespace) -> int:
    """Copy the notebooks, and with --open run JupyterLab until it ends; return its exit status."""
    folder = Path(options.folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Name a folder, or one that does not exist yet.")
    if options.open and importlib.util.find_spec("jupyterlab") is None:
        raise ValueError("--open needs JupyterLab: pip install 'grpo-lab[lab]'")
    from grpo_lab.course.notebooks import write_course

    try:
        written = write_course(folder, options.solutions)
        count = f"{len(written)} notebooks" if written else "nothing new"
        print(f"Written to {folder}: {count}", flush=True)
    except FileExistsError:  # the notebooks of a learner who has worked on them
        if not options.open:
            raise
        print(f"Written to {folder}: nothing, because it holds notebooks that were changed", flush=True)
    if options.open:
        return _run_jupyterlab(folder)
    print(f"Open them: grpo-lab course {folder} --open")
    return 0


def _run_jupyterlab(folder: Path) -> int:
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab"], cwd=folder)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # JupyterLab got it too, and asks before it stops
            continue
