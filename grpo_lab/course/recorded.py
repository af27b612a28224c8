"""Read the recorded runs that the lessons show."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lab.training.metrics import JsonLines


@dataclass(frozen=True)
class RecordedRun:
    """A recorded run, read from its folder in runs/."""

    info: dict[str, Any]
    """The contents of run.json: settings, seed, date, device, versions, accuracy before and after."""
    metrics: list[dict[str, Any]]
    completions: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """Date, device and PyTorch version, shown beside every figure of this run."""
        return f"recorded {self.info['date']} on {self.info['device']}, PyTorch {self.info['versions']['torch']}"


def recorded_runs(name: str, folder: str | Path | None = None) -> list[RecordedRun]:
    """Return the recorded runs of this name, one per seed, sorted by seed.

    Args:
        name: the name of a folder in runs/ without its seed, such as "K-4".
        folder: the folder runs/; None searches the current folder, its parents, beside the package and in it.
    Raises: ValueError if there are none.
    """
    beside, packed = Path(__file__).parents[2], Path(__file__).parent / "data"
    places = [Path(folder)] if folder else [p / "runs" for p in (*_here_and_above(), beside, packed)]
    found = next((paths for place in places if (paths := list(place.glob(f"{name}-seed*")))), [])
    if not found:
        raise ValueError(f"there is no recorded run {name!r} in {', '.join(map(str, places))}.")
    runs = [
        RecordedRun(
            json.loads((path / "run.json").read_text(encoding="utf-8")),
            JsonLines(path / "metrics.jsonl").read(),
            JsonLines(path / "completions.jsonl").read(),
        )
        for path in found
    ]
    return sorted(runs, key=lambda run: run.info["seed"])


def _here_and_above() -> list[Path]:
    here = Path.cwd()
    return [here, *here.parents]
