"""Put the notebooks and the recorded runs into the wheel, as grpo_lab/course/data; the rest is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COURSE = ("notebooks/*.ipynb", "notebooks/solutions/*.ipynb", "runs/**/*.json", "runs/**/*.jsonl")


class BuildWithCourse(build_py):
    """Copy the package, and the course beside its modules."""

    def run(self):
        """An editable installation needs no copy: the package then stands beside notebooks/ and runs/."""
        super().run()
        if self.editable_mode:
            return
        data = Path(self.build_lib, "grpo_lab", "course", "data")
        shutil.rmtree(data, ignore_errors=True)  # of an earlier build
        for path in (path for pattern in COURSE for path in Path().glob(pattern)):
            copy = data / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithCourse})
