"""Prepare Colab for the notebooks."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

OLDEST = {"torch": "2.11", "transformers": "5.15"}
"""The oldest releases that the package supports, as in pyproject.toml."""
OLDEST_TORCHAO = "0.16"
"""PEFT raises an ImportError where an older one is installed; the course does not need torchao."""


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
