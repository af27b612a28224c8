"""What this machine offers: CPU cores, threads, memory, with the limits of its container."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

SMALL_MODEL = 10_000_000  # weights
CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


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


def free_memory(device: str) -> int:
    """Bytes that a run could still take on the device (cuda, mps, or cpu: of the machine and its container)."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free, limits = psutil.virtual_memory().available, container_memory()
    return free if limits is None else min(free, limits[0] - limits[1])
