"""The output folder of a run: find, prune and protect its checkpoints."""

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from grpo_lab.training.checkpoints import FINAL, RUN_FILES, STATE_FILE, remove

LOCK = ".lock"


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
            remove(later)


def prune(output_dir: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond the limit."""
    for old in all_checkpoints(output_dir)[:-limit] if limit else ():
        remove(old)


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
    return [path for path in results if os.path.lexists(path)]


def prepare_output(output_dir: Path, *, overwrite: bool) -> None:
    """Make the output folder, and refuse one with the results of another run unless they may be replaced.

    Nothing is removed here: `remove_results` follows when the first step of the new run has succeeded.

    Raises: ValueError that says how to go on.
    """
    with suppress(OSError):  # the next line gives the reason
        output_dir.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(output_dir)
    if not overwrite:
        refuse_results(output_dir)


def remove_results(output_dir: Path) -> None:
    """Remove the results of an earlier run."""
    for path in _results(output_dir):
        remove(path)


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Keep other processes out of this folder while a run writes to it, by a file that names this process.

    The file of a process that has ended is replaced. Several trainers of one process are not kept apart.

    Raises: ValueError that names the process that uses the folder.
    """
    path, mine = output_dir / LOCK, {"pid": os.getpid(), "host": socket.gethostname()}
    holder = _holder(path)
    ended = holder is None or (holder["host"] == mine["host"] and not psutil.pid_exists(holder["pid"]))
    if not ended and holder != mine:
        raise ValueError(
            f"{output_dir} is in use by process {holder['pid']} on {holder['host']}. Wait until that run has ended, or "
            f"name another folder: --output-dir. If there is no such process, remove {path}."
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as file:  # of two that come at once, one gets it
            json.dump(mine, file)
    except FileExistsError:
        raise ValueError(f"another process has just begun to use {output_dir}. Name another folder.") from None
    except OSError:  # reported with its reason before anything is written
        pass
    try:
        yield
    finally:
        if _holder(path) == mine:
            path.unlink(missing_ok=True)


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "host": str(found["host"])}
    except (OSError, ValueError, TypeError, KeyError):  # none, or not one of ours
        return None


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
