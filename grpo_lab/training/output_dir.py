"""The output folder of a run: find, prune and protect its checkpoints."""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from grpo_lab.training.checkpoints import FINAL, RUN_FILES, STATE_FILE, _hide


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def to_resume(output_dir: Path, resume: bool | str | Path) -> list[Path]:
    """Return the checkpoints to resume from, best first: newest to oldest, or the one folder that is named.

    Raises: ValueError if there is none.
    """
    if resume is not True:
        if not (Path(resume) / STATE_FILE).is_file():
            raise ValueError(f"{resume} is not a checkpoint: it has no {STATE_FILE}.")
        return [Path(resume)]
    checkpoints = all_checkpoints(output_dir)[::-1]
    if not checkpoints:
        raise ValueError(f"there is no checkpoint to resume from in {output_dir}. Start anew without --resume.")
    return checkpoints


def forget_after(output_dir: Path, step: int) -> None:
    """Remove the checkpoints after a step: the resumed run will write them again."""
    for later in all_checkpoints(output_dir):
        if int(later.name.split("-")[1]) > step:
            shutil.rmtree(_hide(later))


def prune(output_dir: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond the limit."""
    for old in all_checkpoints(output_dir)[:-limit] if limit else ():
        shutil.rmtree(_hide(old))


def refuse_results(output_dir: Path) -> None:
    """Raises ValueError, with the ways to go on, if the folder holds the results of a run."""
    if results := _results(output_dir):
        go_on = "Go on with it: --resume (resume=True). " if all_checkpoints(output_dir) else ""
        raise ValueError(
            f"{output_dir} holds the results of another run ({results[0].name}). {go_on}"
            "Replace it: --overwrite-output-dir (overwrite_output_dir=True). Keep it: another --output-dir."
        )


def _results(output_dir: Path) -> list[Path]:
    results = [output_dir / name for name in (FINAL, *RUN_FILES)] + all_checkpoints(output_dir)
    return [path for path in results if path.exists()]


def prepare_output(output_dir: Path, *, overwrite: bool) -> None:
    """Make the output folder, and refuse one with the results of another run unless they may be replaced.

    Raises: ValueError that says how to go on.
    """
    with suppress(OSError):  # the next line gives the reason
        output_dir.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(output_dir)
    if not overwrite:
        refuse_results(output_dir)
    for path in _results(output_dir):
        shutil.rmtree(_hide(path)) if path.is_dir() else path.unlink()


def refuse_unwritable(output_dir: Path) -> None:
    """Raises ValueError, with the cure, if the folder, or the one it would be made in, cannot be written to."""
    if refused := cannot_write(output_dir):
        raise ValueError(f"cannot write to {output_dir} ({refused}). Name another folder: --output-dir.")


def cannot_write(folder: Path) -> str | None:
    """Return why a file cannot be created in this folder, which need not exist yet; None if it can."""
    try:
        tempfile.TemporaryFile(dir=folder_above(folder)).close()
    except OSError as error:
        return error.strerror
    return None


def folder_above(folder: Path) -> Path:
    """Return the folder itself if it exists, else the nearest existing folder above it."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
