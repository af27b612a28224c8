"""Device and precision of a run, and accelerate's handle on them."""

import atexit
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

# For another process that is at work: a slow reward, a checkpoint on a slow disk. NCCL by itself ends a run after ten
# minutes. One that has ended is noticed at once, by its connections or by the launcher.
PATIENCE = timedelta(hours=6)


def make_accelerator(device: str, precision: str, trackers: tuple[str, ...], folder: str) -> Accelerator:
    """accelerate's handle on the device, the scaling of fp16 losses, and the trackers.

    The model itself is not handed to it: `autocast` below says what is computed in half precision, so that
    logits are not turned into float32 all at once, and the user's model stays as it was.

    Raises: ValueError if its launcher asks for what is not done through it.
    """
    available = sorted(str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers())
    if missing := [tracker for tracker in trackers if tracker not in available]:
        raise ValueError(f"the tracker {missing[0]!r} is not installed. Installed: {', '.join(available) or 'none'}.")
    if PartialState._shared_state and PartialState().num_processes == 1:
        # accelerate keeps the first trainer's device and precision for ever; a notebook makes several trainers
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="fp16" if precision == "fp16" else "no",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if str(accelerator.distributed_type.value) not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}. Start processes alone (accelerate launch "
            "--multi_gpu), and shard weights between them with --fsdp."
        )
    if accelerator.num_processes > 1:
        atexit.register(_part, accelerator)
    return accelerator


def _part(accelerator: Accelerator) -> None:
    """At the end of the program. A thread of gloo that frees its last tensor while Python ends would abort it."""
    time.sleep(0.1)  # now it can: it needs Python's lock, and the threads of a group of shards outlive the next line
    accelerator.state.destroy_process_group()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which matrix products run in bf16 or fp16; in fp32 it changes nothing."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


def resolve_device(name: str) -> str:
    """auto, cuda, cpu or mps -> the device to use. Raises ValueError, in plain words, if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if name not in there:
        raise ValueError(f"device must be auto, cuda, cpu or mps, got {name!r}.")
    if not there[name]:
        found = ", ".join(device for device, found in there.items() if found)
        build = " (this PyTorch is built without CUDA)" if name == "cuda" and torch.version.cuda is None else ""
        raise ValueError(f"there is no {name} device here{build}. Found: {found}. Use --device auto.")
    return name


def resolve_precision(name: str, device: str) -> str:
    """auto, fp32, bf16 or fp16 -> the one to use. Raises ValueError for fp16 without CUDA."""
    if name == "auto":
        if device != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device != "cuda":
        raise ValueError(f"precision fp16 needs CUDA (its loss scaling does), not {device}. Use bf16 or fp32.")
    return name
