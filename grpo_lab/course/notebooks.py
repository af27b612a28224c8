"""Copy the notebooks into a folder, and prepare Colab for them."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

OLDEST = {"torch": "2.11", "transformers": "5.15"}
"""The oldest releases that the package supports, as in pyproject.toml."""
OLDEST_TORCHAO = "0.16"
"""PEFT raises an ImportError where an older one is installed; the course does not need torchao."""


def write_course(folder: Path, solutions: bool = False) -> list[Path]:
    """Copy the notebooks into a folder, and the solved ones into folder/solutions if asked for.

    Nothing is written if one of them is there already and differs: it may hold your work.

    Returns: the files that were written; those that were there and equal are left out.
    Raises: FileExistsError if a notebook in the folder differs, FileNotFoundError if the package has no notebooks.
    """
    packed, checkout = Path(__file__).parent / "data" / "notebooks", Path(__file__).parents[2] / "notebooks"
    source = packed if packed.is_dir() else checkout
    found = sorted([*source.glob("*.ipynb"), *(source.glob("solutions/*.ipynb") if solutions else ())])
    if not found:
        raise FileNotFoundError(f"there are no notebooks in {source}. Reinstall grpo-lab.")
    copies = {folder / path.relative_to(source): path.read_bytes() for path in found}
    there = {path: path.read_bytes() for path in copies if path.exists()}
    if changed := [path.name for path in there if there[path] != copies[path]]:
        raise FileExistsError(
            f"{folder} has other versions of {', '.join(changed)}. Name another folder, or move them."
        )
    for path in copies.keys() - there.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(copies[path])
    return sorted(copies.keys() - there.keys())


def prepare_colab() -> None:
    """Check Colab's versions, and uninstall a torchao that PEFT does not accept.

    Raises: RuntimeError if PyTorch or Transformers is too old, CalledProcessError if pip fails.
    """
    old = [f"{name} {version(name)}" for name, oldest in OLDEST.items() if Version(version(name)) < Version(oldest)]
    if old:
        needed = " ".join(f"'{name}>={oldest}'" for name, oldest in OLDEST.items())
        raise RuntimeError(
            f"This Colab runtime has {' and '.join(old)}, which is too old for the course: run "
            f"`%pip install -U {needed}`, then Runtime > Restart session."
        )
    try:
        torchao = version("torchao")
    except PackageNotFoundError:
        return
    if Version(torchao) < Version(OLDEST_TORCHAO):
        print(f"Uninstalling torchao {torchao}: PEFT (LoRA) needs {OLDEST_TORCHAO} or newer, or none.")
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchao"], check=True)
