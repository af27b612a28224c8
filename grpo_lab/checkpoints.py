"""Saving and resuming: a checkpoint is there completely or not at all.

A checkpoint folder is a transformers folder (config, safetensors weights, tokenizer) with one more file,
`training_state.pt`: whatever else decides how the run goes on. It holds tensors and plain values only, and
is read with `weights_only=True`, so that loading one cannot run code.
"""

import json
import os
import random
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers.utils import logging

from grpo_lab.adapters import is_adapted, load_adapter

STATE_FILE = "training_state.pt"
FINAL = "final_model"
RUN_FILES = ("metrics.jsonl", "completions.jsonl", "training.png")

# Settings that may differ when a run goes on: they do not change what is computed.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "save_total_limit", "eval_steps",
    "success_reward", "use_wandb", "wandb_project", "wandb_run_name", "report_to", "device", "max_skipped_steps",
    "gradient_checkpointing", "reward_timeout", "fsdp", "vllm_server", "vllm_gpu_memory",
}  # fmt: skip


class DamagedCheckpointError(ValueError):
    """A checkpoint that is there and cannot be used."""


def save(folder: Path, model: nn.Module, tokenizer, state: dict[str, Any]) -> None:
    """Write a checkpoint so that `folder` appears only when everything is safely on the disk.

    Args:
        folder: replaced if it exists.
        model, tokenizer: written by their own `save_pretrained`.
        state: tensors and plain values.
    Raises: OSError if it cannot be written, ValueError if the folder holds anything but a checkpoint; what
        stood there before is then untouched.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder / STATE_FILE).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files, which saving there would remove. Name a new folder.")
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        # an adapter without asking the Hub about the vocabulary; all other weights in one file, whatever their size
        how = {"save_embedding_layers": False, "selected_adapters": ["default"]}
        how = how if is_adapted(model) else {"max_shard_size": "1000GB"}
        with without_progress_bars():
            model.save_pretrained(unfinished, **how)
        tokenizer.save_pretrained(unfinished)
        sums = {file.name: _checksum(file) for file in unfinished.iterdir()}
        torch.save(state | {"checksums": sums}, unfinished / STATE_FILE)
        for path in [*unfinished.iterdir(), unfinished]:
            _sync(path)
    except Exception as error:  # each library has its own words for a full disk, and few of them say so
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"cannot write {folder} ({type(error).__name__}: {error}). Is the disk full?") from error
    old = _hide(folder)
    os.replace(unfinished, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _hide(folder: Path) -> Path:
    # renamed before it is removed: half removed, it would still look like a checkpoint
    hidden = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, hidden)
    return hidden


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bars from transformers for a while: they would tear the training bar apart."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and flushes files when they are closed
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as content:
        while block := content.read(2**24):
            value = zlib.crc32(block, value)
    return value


def load_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint whose files are as they were written.

    Raises: ValueError if this is no checkpoint, DamagedCheckpointError if a file has changed since.
    """
    if not (folder / STATE_FILE).is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {STATE_FILE}.")
    try:
        archive = zipfile.ZipFile(folder / STATE_FILE)
        if sum(part.file_size for part in archive.infolist()) > (folder / STATE_FILE).stat().st_size:
            raise ValueError(f"{STATE_FILE} is compressed, which torch.save never does")
        if broken := archive.testzip():  # torch.load does not look at the checksums
            raise ValueError(f"{STATE_FILE} has changed at {broken}")
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        for name, checksum in state.pop("checksums").items():
            if _checksum(folder / name) != checksum:
                raise ValueError(f"{name} has changed since it was saved")
        return state
    except Exception as error:  # a damaged file shows itself in many ways
        raise DamagedCheckpointError(_damaged(folder, error)) from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into the model. Raises DamagedCheckpointError if they do not fit."""
    try:
        if is_adapted(model):
            return load_adapter(model, folder)
        # float32 holds what was saved in half precision too; each weight is cast to its own
        widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
        wide = widest if widest == torch.float64 else torch.float32
        with without_progress_bars():
            saved, report = type(model).from_pretrained(
                folder, config=model.config, dtype=wide, local_files_only=True, output_loading_info=True
            )
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers there
            raise ValueError(f"no weights for {', '.join(missing[:3])}")
        model.load_state_dict(saved.state_dict())
    except Exception as error:
        raise DamagedCheckpointError(_damaged(folder, error)) from error


def _damaged(folder: Path, error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return (
        f"the checkpoint {folder} cannot be used ({type(error).__name__}: {first_line[:200]}). "
        "Name an older one, or start anew."
    )


def all_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def to_resume(output_dir: Path, resume: bool | str | Path) -> list[Path]:
    """The checkpoints to go on from, best first: the newest and those before it, or the folder that is named.

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
    """Remove the checkpoints of later steps: a run that goes on from an earlier one will make them again."""
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
    with suppress(OSError):  # said in words by the next line
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
    """Why a file cannot be made in this folder, which may not be there yet; None if one can."""
    try:
        tempfile.TemporaryFile(dir=folder_above(folder)).close()
    except OSError as error:
        return error.strerror
    return None


def folder_above(folder: Path) -> Path:
    """The folder itself, or the one above it in which it would be made."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))


def fingerprint(rows: Iterable[Any]) -> str:
    """A short hash of all rows in their order, to notice a changed dataset."""
    value = 0
    for row in rows:
        value = zlib.crc32(json.dumps(row, sort_keys=True, default=repr).encode(), value)
    return f"{value:08x}"


def weights_fingerprint(model: nn.Module, *, frozen: bool = False) -> str:
    """A short hash of a model's weights, or of those alone that are not trained, whatever their precision."""
    value = 0
    for parameter in model.parameters():
        if frozen and parameter.requires_grad:
            continue
        value = zlib.crc32(parameter.detach().float().cpu().contiguous().numpy(), value)
    return f"{value:08x}"


def check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError with the differences if a checkpoint is of another run than this one.

    Args:
        before, now: all settings, and fingerprints of what else decides the run.
    """
    names = sorted((before.keys() | now.keys()) - FREE_TO_CHANGE)
    changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"the checkpoint was made with other settings, so the run would not go on as it was: {'; '.join(changed)}. "
            "Resume with the old ones (and a model and reference loaded anew), or start a new run from the saved "
            "weights: --model-name CHECKPOINT."
        )


def random_state() -> dict[str, Any]:
    """The state of every global random number generator, as tensors and plain values."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype("int64")), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
