"""Where a model computes, and how precisely: device, precision, optimizer, memory, threads, dropout."""

import atexit
import ctypes
import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.optim import Optimizer

from grpo_lab.config import GRPOConfig

SMALL_MODEL = 10_000_000  # weights
CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
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


def trainable_in_float32(model: nn.Module) -> None:
    """Turn trained weights in half precision into float32: at usual learning rates an update would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def make_optimizer(model: nn.Module, config: GRPOConfig, device: torch.device) -> Optimizer:
    """AdamW over the weights that are trained, by `config.optimizer` with its running means in float32 or in 8 bits.

    The weights are float32 either way. In 8 bits (Dettmers et al., arXiv 2110.02861) each block of 256 numbers has a
    scale of its own, so that 8 bytes per weight become 2 and a bit; of a tensor with fewer than 4096 weights they
    stay in float32. Weights whose gradients are tiny beside others of their block go another way than AdamW's.

    Raises: ValueError where all weights are frozen, bitsandbytes is not installed, or cannot take such a step on this
        device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "all weights of the model are frozen: there is nothing to train. An adapter that was saved? "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, **settings, fused=device.type in ("cpu", "cuda"))
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer adamw_8bit needs bitsandbytes: pip install 'bitsandbytes>=0.50'.") from error
    one = nn.Parameter(torch.zeros(4096, device=device))  # the fewest that are kept in 8 bits
    one.grad = torch.ones_like(one)
    try:  # its list of devices names some on which the step is not written
        AdamW8bit([one], lr=1.0).step()
    except Exception as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ValueError(
            f"optimizer adamw_8bit does not run on {device.type} with this bitsandbytes ({words}). "
            "Use a newer one (pip install -U bitsandbytes), or --optimizer adamw."
        ) from error
    return AdamW8bit(trained, **settings)


def match_precision(model: nn.Module, other: nn.Module) -> None:
    """Give the model's weights the precision that the same weights have in the other; buffers stay as they are."""
    wanted = {name: parameter.dtype for name, parameter in other.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wanted.get(name, parameter.dtype))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: nn.Dropout, and the plain numbers that attention layers keep for functional calls.

    eval() would do it too, but would also turn off gradient checkpointing.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def enable_checkpointing(model: nn.Module) -> None:
    """Keep only each layer's input for the backward pass, and compute the rest once more there (in train mode)."""
    if next(model.parameters()).device.type == "cpu":
        return_freed_memory()
    # transformers renamed it in 5.2x; older versions know the second name only
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def return_freed_memory() -> None:
    """Have glibc give blocks of a megabyte or more back to the system as soon as they are freed; for good.

    By itself it keeps blocks of up to 32 MB, and where layers are computed anew what it keeps falls into pieces:
    checkpointing would save nothing. It costs time, since fresh memory has to be filled with zeros. Measured on
    models of 25 and 135 M weights: 1.10 GiB instead of 1.84 at the highest, and 3.03 instead of 4.53; a third and
    6 % more processor time.
    """
    with suppress(OSError, AttributeError, TypeError):  # no glibc: another allocator, which may do so anyway
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def threads_for(model: nn.Module) -> int:
    """One thread for a small model, else one for each core.

    The matrices of the pocket model are too small to share: two threads gain nothing on two idle cores, and
    where another program wants a core too, one waits for the other (measured: 15 times slower).
    """
    return 1 if sum(p.numel() for p in model.parameters()) < SMALL_MODEL else available_cores()


def available_cores() -> int:
    """The cores that this process really has: its CPU set, the quota of its container, its share beside others.

    A container with half a core sees all of the machine's; two threads on one busy core are many times
    slower than one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of one run, as launchers say
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroups, version 2 and 1
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
            if int(quota) > 0:
                return max(1, min(cores, int(quota) // int(period)) // beside)
        except (OSError, ValueError):  # not this version, or no quota ("max", -1)
            continue
    return max(1, cores // beside)


def container_memory() -> tuple[int, int] | None:
    """Bytes that the container may use, and uses, without what files fill for the time being; None without a limit."""
    for folder, name in ((CGROUP, "memory.max"), (CGROUP / "memory", "memory.limit_in_bytes")):  # versions 2 and 1
        limit = text_of(folder / name).strip()
        if limit.isdecimal() and int(limit) < psutil.virtual_memory().total:
            counts = dict(line.split() for line in text_of(folder / "memory.stat").splitlines())
            return int(limit), int(counts.get("anon") or counts.get("total_rss") or 0)
    return None


def text_of(path: Path) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of all weights, and of those that are trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return {"weights": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}


def prompts_at_once(
    model: nn.Module, config: GRPOConfig, precision: str, columns: int, *, weights: int, trained: int
) -> int:
    """For how many prompts to sample together: the more, the fewer times the weights are read for each token.

    Keys, values and logits get the room that the gradients take later in a step, or half that of the weights,
    whichever is more; and what four micro-batches of completions need, because a training pass keeps at least eight
    times as much of each token (one, where activations are recomputed).

    Args:
        columns: tokens of prompt and completion at most.
        weights, trained: see `weight_bytes`.
    """
    micro_batches = config.batch_size * (1 if config.gradient_checkpointing else 4)
    known = model.config.get_text_config()
    heads = getattr(known, "num_key_value_heads", None) or getattr(known, "num_attention_heads", None)
    width = getattr(known, "head_dim", None) or (heads and known.hidden_size // known.num_attention_heads)
    if not isinstance(heads, int) or not isinstance(width, int):  # another kind of cache
        return micro_batches
    cache = 2 * known.num_hidden_layers * heads * width * columns * (4 if precision == "fp32" else 2)
    logits = 28 * model.get_input_embeddings().weight.shape[0]  # in float32, with what `truncate` makes of them
    room = max(trained, weights // 2)
    return max(micro_batches, room // ((cache + logits) * config.num_generations_per_prompt))


def free_memory(device: str) -> int:
    """Bytes that a run could still take on the device (cuda, mps, or cpu: of the machine and its container)."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free, limits = psutil.virtual_memory().available, container_memory()
    return free if limits is None else min(free, limits[0] - limits[1])
