"""Write and read checkpoints; a checkpoint appears completely or not at all.

A checkpoint folder is a transformers folder (config, safetensors weights, tokenizer) with one more file,
`training_state.pt`: whatever else decides how the run goes on. It holds tensors and plain values only, and
is read with `weights_only=True`, so that loading one cannot run code.
"""

import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_lab.models.adapters import is_adapted, load_adapter
from grpo_lab.models.loading import without_progress_bars

STATE_FILE = "training_state.pt"
FINAL = "final_model"
RUN_FILES = ("metrics.jsonl", "completions.jsonl", "training.png")


# the words of the system, of safetensors and of torch.save; EFBIG is the limit of a process
DISK_FULL = re.compile(
    "No space left|File too large|[Qq]uota|os error (27|28|122)|PytorchStreamWriter|inline_container|file write"
)
_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it; once, at import, before there are other threads


class DamagedCheckpointError(ValueError):
    """A checkpoint exists and cannot be used."""


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
    try:
        remove(unfinished)
        unfinished.mkdir(parents=True)
        # an adapter: without a request to the Hub about its vocabulary; a model: in one file, whatever its size
        how = {"save_embedding_layers": False, "selected_adapters": ["default"]}
        how = how if is_adapted(model) else {"max_shard_size": "1000GB"}
        with without_progress_bars():
            model.save_pretrained(unfinished, **how)
        tokenizer.save_pretrained(unfinished)
        sums = {file.name: _checksum(file) for file in unfinished.iterdir()}
        torch.save(state | {"checksums": sums}, unfinished / STATE_FILE)
        for path in [*unfinished.iterdir(), unfinished]:
            _follow_umask(path)
            _sync(path)
    except Exception as error:  # libraries report a full disk in different ways
        shutil.rmtree(unfinished, ignore_errors=True)
        full = " Is the disk full?" if DISK_FULL.search(str(error)) else ""
        raise OSError(f"cannot write {folder} ({type(error).__name__}: {error}).{full}") from error
    old = _hide(folder)
    os.replace(unfinished, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder; a folder disappears at once or not at all."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(_hide(path))
    else:
        path.unlink(missing_ok=True)


def _hide(folder: Path) -> Path:
    # renamed before it is removed: half removed, it would still look like a checkpoint
    hidden = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, hidden)
    return hidden


def _follow_umask(path: Path) -> None:
    """Give a file the permissions of any new file: safetensors makes files that only their owner can read."""
    if path.is_file() and os.name != "nt":
        path.chmod(0o666 & ~_UMASK)


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
    """Load the training state of a checkpoint after checking that no file has changed.

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
    except Exception as error:  # damaged files raise many exceptions
        raise DamagedCheckpointError(_damaged(folder, error)) from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into the model. Raises DamagedCheckpointError if they do not fit."""
    try:
        if is_adapted(model):
            return load_adapter(model, folder)
        # read as float32, which holds half precision exactly; load_state_dict casts to the model's types
        widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
        wide = widest if widest == torch.float64 else torch.float32
        with without_progress_bars():
            saved, report = type(model).from_pretrained(
                folder, config=model.config, dtype=wide, local_files_only=True, output_loading_info=True
            )
        if missing := sorted(report["missing_keys"]):  # transformers would initialise them at random
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
