"""Device and precision of a run, and its `Accelerator`."""

import atexit
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

# How long a collective waits for a rank that is busy, with a slow reward function or a checkpoint on a slow disk.
# NCCL's default is ten minutes. A rank that has exited is noticed at once, by closed connections or by the launcher.
COLLECTIVE_TIMEOUT = timedelta(hours=6)


def make_accelerator(device: str, precision: str, trackers: tuple[str, ...], folder: str) -> Accelerator:
    """Make the `Accelerator` that handles the device, loss scaling in fp16, and the trackers.

    The model is not passed to `Accelerator.prepare`, which would convert all logits to float32 at once and change the
    user's model. `autocast` below selects half precision instead.

    Raises: ValueError if a tracker is not installed, or if the launcher asks for DeepSpeed, FSDP or the like.
    """
    available = sorted(str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers())
    if missing := [tracker for tracker in trackers if tracker not in available]:
        raise ValueError(f"the tracker {missing[0]!r} is not installed. Installed: {', '.join(available) or 'none'}.")
    if PartialState._shared_state and PartialState().num_processes == 1:
        # accelerate keeps the first device and precision in global state; a notebook makes several trainers
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="fp16" if precision == "fp16" else "no",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    if str(accelerator.distributed_type.value) not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not supported. Use accelerate "
            "launch --multi_gpu, and shard weights with grpo-lab's own --fsdp."
        )
    if accelerator.num_processes > 1:
        atexit.register(_destroy_process_group, accelerator)
    return accelerator


def _destroy_process_group(accelerator: Accelerator) -> None:
    """Destroy the process group at exit: a gloo thread that frees a tensor during shutdown crashes the interpreter."""
    # Sleeping releases the GIL, which gloo's threads need to free their tensors; with FSDP, some threads outlive
    # the next line.
    time.sleep(0.1)
    accelerator.state.destroy_process_group()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context manager that runs matrix products in bf16 or fp16; for fp32 it does nothing."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


def resolve_device(name: str) -> str:
    """Return the device to use for "auto", "cuda", "cpu" or "mps". Raises ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in available.items() if found)
    if name not in available:
        raise ValueError(f"device must be auto, cuda, cpu or mps, got {name!r}.")
    if not available[name]:
        found = ", ".join(device for device, found in available.items() if found)
        build = " (this PyTorch is built without CUDA)" if name == "cuda" and torch.version.cuda is None else ""
        raise ValueError(f"there is no {name} device here{build}. Found: {found}. Use --device auto.")
    return name


def resolve_precision(name: str, device: str) -> str:
    """Return the precision to use for "auto", "fp32", "bf16" or "fp16". Raises ValueError for fp16 without CUDA."""
    if name == "auto":
        if device != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device != "cuda":
        raise ValueError(f"precision fp16 needs CUDA for its loss scaling, got device {device}. Use bf16 or fp32.")
    return name
