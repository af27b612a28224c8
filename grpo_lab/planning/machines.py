"""Memory and speed of the machines that a plan can be made for, and of this one.

The time of an operation is that of its arithmetic or of its memory traffic, whichever is longer, and at least the
launch overhead. Peak rates of named machines are from data sheets; which fraction of them is reached is assumed.
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
from grpo_lab.planning.dry_run import OpCost
from grpo_lab.training.config import GRPOConfig

GIB = 2**30
CPU_RESERVE = 0.2  # glibc holds 10 to 55 % more than the live bytes (fitted to the runs of benchmarks/memory.py)


@dataclass(frozen=True)
class Machine:
    """A device that a run could use: its memory and its speed."""

    name: str
    device: str
    """cuda, cpu or mps."""
    memory: float
    """Bytes that the run can use in total."""
    flops: dict[str, float]
    """Precision -> reached FLOP/s of a matrix product."""
    bandwidth: float
    """Reached bytes per second, reads and writes."""
    launch: float
    """Launch overhead: minimum seconds per operation."""
    taken: float
    """Bytes in use before the first tensor: Python and its libraries, the GPU driver, or vLLM."""
    reserve: float = 0.0
    """Bytes that the allocator holds beyond the live bytes, as a fraction of these."""
    measured: bool = False
    """False: rates from data sheets and assumptions."""

    def part_for(self, config: GRPOConfig, processes: int) -> "Machine":
        """Return the machine as one of `processes` sees it: a GPU, less vLLM's memory, or a part of the main memory."""
        if self.device == "cpu":
            return replace(self, memory=self.memory / processes)
        vllm = config.vllm_gpu_memory if config.sampler == "vllm" and config.vllm_server is None else 0.0
        return replace(self, taken=self.taken + vllm * self.memory) if vllm else self

    def seconds(self, operations: Iterable[OpCost], precision: str) -> float:
        """Return the time that these operations take; views take none."""
        rate = self.flops[precision]
        return sum(max(op.flops / rate, op.bytes / self.bandwidth, self.launch) for op in operations if op.bytes)


def _gpu(name: str, gib: float, half: float, full: float, bandwidth: float) -> Machine:
    # Memory: the total capacity in PyTorch's out-of-memory message. Rates: dense, from NVIDIA's data sheets, in TFLOP/s
    # and GB/s. Assumptions, not measured: half of the peak FLOP/s and 70 % of the bandwidth are reached, 5 us per
    # launch, 0.6 GiB for driver and libraries, 5 % fragmentation.
    flops = {"fp32": full * 0.5e12, "bf16": half * 0.5e12, "fp16": half * 0.5e12}
    return Machine(name, "cuda", gib * GIB, flops, bandwidth * 0.7e9, 5e-6, 0.6 * GIB, 0.05)


def _computer(name: str, gib: float, cores: int, bandwidth: float) -> Machine:
    # Assumptions: 50 GFLOP/s per core in any precision, and 0.45 GiB for Python, PyTorch and transformers.
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
        _computer("laptop", 12, 8, 50),  # 16 GB, less the system and a browser
        _computer("binder", 1.8, 1, 10),  # the 2 GB of mybinder.org, less its Jupyter server
    )
}


def named_machine(name: str) -> Machine:
    """Return one of MACHINES; case is ignored. Raises ValueError for an unknown name."""
    known = {key.lower(): machine for key, machine in MACHINES.items()}
    if name.lower() not in known:
        raise ValueError(f"there is no machine {name!r}. Use one of {', '.join(MACHINES)}, or none for this machine.")
    return known[name.lower()]


def precision_on(machine: Machine | None, config: GRPOConfig) -> str:
    """Return the precision of a run with this config on a machine; None means this machine."""
    if machine is None or machine.measured:
        return resolve_precision(config.precision, machine.device if machine else resolve_device(config.device))
    if config.precision == "auto" and machine.device == "cuda":
        return "fp16" if machine.name == "T4" else "bf16"
    return "fp32" if config.precision == "auto" else resolve_precision(config.precision, machine.device)


def this_machine(config: GRPOConfig, loaded: int = 0, processes: int = 1) -> Machine:
    """Return the device that a run with this config would use, with its free memory and measured rates.

    Args:
        loaded: bytes of models already in main memory, which the plan counts by itself.
        processes: number of processes that share the free memory.
    """
    import psutil

    device = resolve_device(config.device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # one GPU per process: do not create a context on another one
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
    """Measure FLOP/s of a matrix product, bytes per second of a copy, and seconds of the smallest operation."""
    size = 8192 if device == "cuda" else 512
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    square = torch.ones(size, size, device=device, dtype=dtype)
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    target, small = torch.empty_like(source), torch.ones(8, device=device)

    def fastest(run, repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run().flatten()[0].item()  # synchronises with the device
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def thousand_additions() -> Tensor:
        total = small
        for _ in range(1000):
            total = total + small
        return total

    product, copy = fastest(lambda: square @ square, 7), fastest(lambda: target.copy_(source), 3)
    return 2 * size**3 / product, 2 * source.nbytes / copy, fastest(thousand_additions, 3) / 1000
