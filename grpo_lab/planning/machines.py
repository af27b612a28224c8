"""Machines that a run could take: how much memory they have, how fast they are, and what is there now.

An operation is taken to last as long as its arithmetic or its memory traffic, whichever is longer, and as long as a
launch at least. Peak rates of named machines are their makers'; how much of them is reached is assumed.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from grpo_lab.hardware.devices import resolve_device, resolve_precision
from grpo_lab.hardware.system import free_memory
from grpo_lab.planning.rehearsal import Work
from grpo_lab.training.config import GRPOConfig

GIB = 2**30
CPU_RESERVE = 0.2  # glibc keeps more than is live: fitted to the runs of benchmarks/memory.py, where it was 10 to 55 %


@dataclass(frozen=True)
class Machine:
    """Where a run would compute."""

    name: str
    device: str
    """cuda, cpu or mps."""
    memory: float
    """Bytes that the run may take, all in all."""
    flops: dict[str, float]
    """Precision -> operations of a matrix product per second, as reached."""
    bandwidth: float
    """Bytes read or written per second, as reached."""
    launch: float
    """Seconds that an operation takes at least."""
    taken: float
    """Bytes taken before the first tensor: by Python and its libraries, or by the GPU's driver."""
    reserve: float = 0.0
    """What the allocator keeps beyond what is live, as a share of that."""
    measured: bool = False
    """False: looked up and assumed."""

    def part_for(self, config: GRPOConfig, processes: int) -> "Machine":
        """What one of so many processes finds: a GPU, less what vLLM has of it, or its part of the main memory."""
        if self.device == "cpu":
            return replace(self, memory=self.memory / processes)
        vllm = config.vllm_gpu_memory if config.sampler == "vllm" and config.vllm_server is None else 0.0
        return replace(self, taken=self.taken + vllm * self.memory) if vllm else self

    def seconds(self, work: Iterable[Work], precision: str) -> float:
        """How long these operations take."""
        rate = self.flops[precision]
        return sum(max(w.flops / rate, w.bytes / self.bandwidth, self.launch) for w in work if w.bytes)


def _gpu(name: str, gib: float, half: float, full: float, bandwidth: float) -> Machine:
    # Memory: the total capacity that PyTorch names there when it is out of memory. Rates: dense, from NVIDIA's data
    # sheets, in TFLOP/s and GB/s. Assumed, and not measured yet: that half of the arithmetic and 70 % of the bandwidth
    # are reached, 5 us a launch, 0.6 GiB for the driver and libraries, 5 % lost between the allocator's blocks.
    flops = {"fp32": full * 0.5e12, "bf16": half * 0.5e12, "fp16": half * 0.5e12}
    return Machine(name, "cuda", gib * GIB, flops, bandwidth * 0.7e9, 5e-6, 0.6 * GIB, 0.05)


def _computer(name: str, gib: float, cores: int, bandwidth: float) -> Machine:
    # Assumed: 50 GFLOP/s a core, no faster in half precision, and 0.45 GiB for Python, PyTorch and transformers.
    return Machine(name, "cpu", gib * GIB, dict.fromkeys(("fp32", "bf16"), cores * 5e10), bandwidth * 1e9, 5e-6,
                   0.45 * GIB, CPU_RESERVE)  # fmt: skip


MACHINES = {
    machine.name: machine
    for machine in (
        _gpu("T4", 14.56, 65, 8.1, 320),
        _gpu("L4", 22.03, 121, 30.3, 300),
        _gpu("A100-40", 39.38, 312, 19.5, 1555),
        _gpu("A100-80", 79.14, 312, 19.5, 2039),
        _gpu("H100", 79.18, 989, 67, 3350),
        _gpu("H200", 139.72, 989, 67, 4800),
        _computer("laptop", 12, 8, 50),  # of 16 GB, the system and a browser take the rest
        _computer("binder", 1.8, 1, 10),  # mybinder.org allows 2 GB, and its Jupyter server takes some
    )
}


def named_machine(name: str) -> Machine:
    """One of MACHINES, however its name is capitalised. Raises ValueError for another."""
    known = {key.lower(): machine for key, machine in MACHINES.items()}
    if name.lower() not in known:
        raise ValueError(f"there is no machine {name!r}. Machines: {', '.join(MACHINES)}; without a name, this one.")
    return known[name.lower()]


def precision_on(machine: Machine | None, config: GRPOConfig) -> str:
    """What the config's precision is there; None: here."""
    if machine is None or machine.measured:
        return resolve_precision(config.precision, machine.device if machine else resolve_device(config.device))
    if config.precision == "auto" and machine.device == "cuda":
        return "fp16" if machine.name == "T4" else "bf16"
    return "fp32" if config.precision == "auto" else resolve_precision(config.precision, machine.device)


def this_machine(config: GRPOConfig, loaded: int = 0, processes: int = 1) -> Machine:
    """The device that a run with this config would take, with what is free on it now, its rates measured.

    Args:
        loaded: bytes of models that are in main memory already, and are counted elsewhere.
        processes: that take their parts of what is free.
    """
    import psutil

    device = resolve_device(config.device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # each of several processes has its own, and touches no other
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    precision = resolve_precision(config.precision, device)
    free, taken = free_memory(device), 0.0
    name = torch.cuda.get_device_name() if device == "cuda" else f"this machine ({device})"
    if device == "cpu":
        taken = max(0, psutil.Process().memory_info().rss - loaded)
    flops, bandwidth, launch = _rates(device, precision, torch.get_num_threads())
    if device == "cpu":
        reserve, memory = CPU_RESERVE, free / processes + taken + loaded
    else:
        reserve, memory = 0.05 if device == "cuda" else CPU_RESERVE, free
    machine = Machine(name, device, memory, {precision: flops}, bandwidth, launch, taken, reserve, measured=True)
    return machine if device == "cpu" else machine.part_for(config, processes)


@cache
def _rates(device: str, precision: str, threads: int) -> tuple[float, float, float]:
    """Operations per second of a matrix product, bytes per second of a copy, seconds of the smallest operation."""
    size = 8192 if device == "cuda" else 512
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    square = torch.ones(size, size, device=device, dtype=kind)
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    target, little = torch.empty_like(source), torch.ones(8, device=device)

    def best(work, times: int) -> float:
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            work().flatten()[0].item()  # which waits for the device
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    def many() -> Tensor:
        total = little
        for _ in range(1000):
            total = total + little
        return total

    product, copied = best(lambda: square @ square, 7), best(lambda: target.copy_(source), 3)
    return 2 * size**3 / product, 2 * source.nbytes / copied, best(many, 3) / 1000
