"""Will it fit, and how long will a step take? Known before the first weight is loaded.

`plan(config, model)` rehearses the trainer's own code on tensors without contents (rehearsal.py): one micro-batch of
the update, one of the reference and reward model, the reading of the prompts and two tokens of sampling. It assumes
the worst: all completions differ and are as long as they may be. To this come the weights and what the optimizer
keeps, and what Python or the GPU's driver take.

An operation is taken to last as long as its arithmetic or its memory traffic, whichever is longer, and as long as a
launch at least. Peak rates of named machines are their makers'; how much of them is reached is assumed.
"""

import math
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_lab import pocket
from grpo_lab.adapters import add_lora, is_adapted
from grpo_lab.config import GRPOConfig
from grpo_lab.decoding import Captured, Growing, can_capture
from grpo_lab.devices import (
    autocast,
    disable_dropout,
    enable_checkpointing,
    free_memory,
    prompts_at_once,
    resolve_device,
    resolve_precision,
    trainable_in_float32,
    weight_bytes,
)
from grpo_lab.forward import built_like, completion_states
from grpo_lab.logprobs import token_logprobs, truncate
from grpo_lab.losses import grpo_loss
from grpo_lab.rehearsal import NUCLEUS, Count, Depths, Rehearsal, Work, emptied, size_of
from grpo_lab.sampling import pick
from grpo_lab.scoring import completion_logprobs, completion_scores

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "reference", "reward model", "cache", "activations", "logits",
         "rollouts", "everything else")  # fmt: skip
PROMPT_TOKENS = 128
CPU_RESERVE = 0.2  # glibc keeps more than is live: fitted to the runs of benchmarks/memory.py, where it was 10 to 55 %
ADAM_TRAFFIC = 7 * 4  # bytes a weight: itself, its gradient and two averages are read, all but the gradient written


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

# config.json of Qwen/Qwen2.5-*-Instruct: hidden size, layers, heads, key-value heads, intermediate size, vocabulary
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064),
}


@dataclass(frozen=True)
class Plan:
    """What a run needs. `str(plan)` is a table."""

    name: str
    """Of the model."""
    config: GRPOConfig
    machine: Machine
    precision: str
    prompt_tokens: int
    rehearsed: tuple["Phase", ...]
    processes: int = 1
    """Of which one is planned for; each has its own GPU, or its part of the main memory."""

    @cached_property
    def phases(self) -> dict[str, dict[str, int]]:
        """Phase of a step -> part -> bytes at the phase's highest point."""
        # with checkpointing or shards, freed memory goes back at once on a CPU: devices.return_freed_memory
        sharded = self.config.fsdp and self.processes > 1
        kept = self.machine.device != "cpu" or not (self.config.gradient_checkpointing or sharded)
        return {phase.name: phase.on(self.machine, self.machine.reserve * kept) for phase in self.rehearsed}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Phase of a step -> how long it takes at most, all its micro-batches together."""
        return {phase.name: phase.seconds(self.machine, self.precision) for phase in self.rehearsed}

    def on(self, machine: str | Machine) -> "Plan":
        """The same on another machine, without rehearsing it again.

        Raises: ValueError if that one would compute otherwise: on another kind of device, or in another precision.
        """
        if not isinstance(machine, Machine):
            machine = named_machine(machine).part_for(self.config, self.processes)
        precision = _precision(self.config, machine)
        if (machine.device, precision == "fp32") != (self.machine.device, self.precision == "fp32"):
            raise ValueError(f"{machine.name} would compute otherwise than {self.machine.name}: plan for it anew.")
        return replace(self, machine=machine, precision=precision)

    @property
    def highest(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes at the highest point of a step."""
        return sum(self.phases[self.highest].values())

    @property
    def fits(self) -> bool:
        """Is there room for the peak?"""
        return self.peak <= self.machine.memory

    @property
    def verdict(self) -> str:
        """Whether it fits, in a sentence."""
        share = self.peak / self.machine.memory
        words = "does not fit" if share > 1 else "fits, but barely" if share > 1 / 1.15 else "fits"
        return (
            f"{words}: {self.peak / GIB:.2f} of {self.machine.memory / GIB:.2f} GiB on {self.machine.name}{self._of}, "
            f"highest in {self.highest}; up to {_time(sum(self.seconds.values()))} a step"
        )

    @property
    def _of(self) -> str:
        return f", each of {self.processes} processes" if self.processes > 1 else ""

    def __str__(self) -> str:
        config, rows = self.config, [part for part in PARTS if any(p[part] for p in self.phases.values())]
        settings = f"K {config.num_generations_per_prompt} × {config.batch_size} prompts at a time"
        lengths = f"{self.prompt_tokens} + {config.max_new_tokens} tokens, {self.precision}"
        lines = [f"{self.name} on {self.machine.name}{self._of}: {settings}, {lengths}", ""]
        lines.append(f"{'GiB':17}" + "".join(f"{phase:>12}" for phase in self.phases))
        for part in rows:
            lines.append(f"{part:17}" + "".join(f"{p[part] / GIB:12.2f}" for p in self.phases.values()))
        lines.append(f"{'all':17}" + "".join(f"{sum(p.values()) / GIB:12.2f}" for p in self.phases.values()))
        lines.append(f"{'time a step':17}" + "".join(f"{_time(self.seconds[phase]):>12}" for phase in self.phases))
        source = "measured just now" if self.machine.measured else "looked up, its efficiency assumed"
        return "\n".join([*lines, "", f"It {self.verdict} (the machine: {source})."])


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.3g} s"


def plan(
    config: GRPOConfig | None,
    model: nn.Module,
    *,
    reward_model: nn.Module | Sequence | None = None,
    machine: str | Machine | None = None,
    prompt_tokens: int | None = None,
    processes: int = 1,
    name: str | None = None,
) -> Plan:
    """What would this run need, and is it there? Takes seconds for a model of billions of weights, and no memory.

    Args:
        config: None takes the defaults.
        model: the policy as it would be given to the trainer; one on the meta device, without weights, will do.
        reward_model: as the trainer takes it; functions need nothing.
        machine: one of MACHINES by name, or None: this one, with what is free now.
        prompt_tokens: of the longest prompt; None: 128, or what the model's context leaves.
        processes: that share the run out, on GPUs of their own or one machine's cores; planned is what each takes.
        name: of the model, for the table.
    Raises: ValueError for an unknown machine, lengths that the model does not take, or fewer prompts than processes.
    """
    config = config or GRPOConfig()
    if not 1 <= processes <= config.prompts_per_step:
        raise ValueError(
            f"processes must be at least 1 and at most {config.prompts_per_step}, the prompts of a step, "
            f"got {processes}. Raise --batch-size."
        )
    room = (getattr(model.config, "max_position_embeddings", None) or math.inf) - config.max_new_tokens
    prompt_tokens = min(PROMPT_TOKENS, room) if prompt_tokens is None else prompt_tokens
    if not 1 <= prompt_tokens <= room:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens {config.max_new_tokens} do not fit into the "
            f"model's context of {room + config.max_new_tokens}. Shorten the prompt or lower --max-new-tokens."
        )
    if isinstance(machine, str):
        machine = named_machine(machine).part_for(config, processes)
    device = machine.device if machine else resolve_device(config.device)
    judges = _judges(reward_model)
    precision = _precision(config, machine)
    phases = _rehearse(_Shape.of(config, model, precision, prompt_tokens, processes), model, judges, device)
    loaded = [t for m in (model, *judges) for t in (*m.parameters(), *m.buffers()) if t.device.type == "cpu"]
    # last: what the rehearsal leaves behind is taken, too
    machine = machine or this_machine(config, size_of(loaded), processes)
    name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
    return Plan(name, config, machine, precision, prompt_tokens, tuple(phases), processes)


def _judges(reward_model: nn.Module | Sequence | None) -> list[nn.Module]:
    judges = reward_model if isinstance(reward_model, list | tuple) else [reward_model]
    models = [judge if isinstance(judge, nn.Module) else getattr(judge, "model", None) for judge in judges]
    return [model for model in models if isinstance(model, nn.Module)]


def named_machine(name: str) -> Machine:
    """One of MACHINES, however its name is capitalised. Raises ValueError for another."""
    known = {key.lower(): machine for key, machine in MACHINES.items()}
    if name.lower() not in known:
        raise ValueError(f"there is no machine {name!r}. Machines: {', '.join(MACHINES)}; without a name, this one.")
    return known[name.lower()]


def _precision(config: GRPOConfig, machine: Machine | None) -> str:
    if machine is None or machine.measured:
        return resolve_precision(config.precision, machine.device if machine else resolve_device(config.device))
    if config.precision == "auto" and machine.device == "cuda":
        return "fp16" if machine.name == "T4" else "bf16"
    return "fp32" if config.precision == "auto" else resolve_precision(config.precision, machine.device)


# --- what is there, and how fast it is ----------------------------------------------------------------------


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


# --- the rehearsal ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """Of one micro-batch, and of what is sampled at a time."""

    config: GRPOConfig
    precision: str
    prompt: int
    kept: int
    """Tokens that could have been drawn, at each position; 0 if all could."""
    processes: int = 1
    sampled_at_once: int = 1
    """Prompts."""

    @classmethod
    def of(cls, config: GRPOConfig, model: nn.Module, precision: str, prompt: int, processes: int = 1) -> "_Shape":
        vocabulary = model.get_input_embeddings().weight.shape[0]
        some = 0 < config.top_k < vocabulary or config.top_p < 1
        return cls(config, precision, prompt, min(config.top_k or NUCLEUS, vocabulary) if some else 0, processes)

    @property
    def prompts(self) -> int:
        """Of a step, that the process with the most has."""
        return -(-self.config.prompts_per_step // self.processes)

    @property
    def micro_batches(self) -> int:
        return -(-self.prompts // self.config.batch_size)

    @property
    def shards(self) -> int:
        """Among how many processes what is trained is shared out."""
        return self.processes if self.config.fsdp else 1

    def rows(self, prompts: int, columns: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask: prompts that differ, each with K completions that differ."""
        K, draws = self.config.num_generations_per_prompt, torch.Generator().manual_seed(0)
        ids = torch.randint(2, 20, (prompts * K, columns), generator=draws)
        ids[:, : self.prompt] = ids[::K, : self.prompt].repeat_interleave(K, 0)
        return ids, torch.ones_like(ids)

    def micro_batch(self) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
        """Arguments for the scorer."""
        config = self.config
        ids, mask = self.rows(min(self.prompts, config.batch_size), self.prompt + config.max_new_tokens)
        kept = torch.zeros(len(ids), config.max_new_tokens, self.kept, dtype=torch.long) if self.kept else None
        how = {"share": config.disable_dropout, "temperature": config.temperature, "kept": kept}
        return (ids, mask, config.max_new_tokens), how

    def autocast(self) -> torch.autocast:
        return autocast(torch.device("cpu"), self.precision)


class Phase(NamedTuple):
    """Of a step: sampling, scoring, update; or saving, after the last."""

    name: str
    parts: dict[str, int]
    """Bytes at its highest point, without what the machine itself takes."""
    work: list[tuple[float, list[Work]]]
    """How many times which operations."""

    def on(self, machine: Machine, reserve: float) -> dict[str, int]:
        """The parts, with what the machine takes."""
        return self.parts | {"everything else": int(machine.taken + reserve * sum(self.parts.values()))}

    def seconds(self, machine: Machine, precision: str) -> float:
        """How long all of it takes."""
        return sum(times * machine.seconds(work, precision) for times, work in self.work)


def _rehearse(
    shape: _Shape, model: nn.Module, judges: list[nn.Module], device: str, room: float = math.inf
) -> list[Phase] | None:
    """The phases of a step on this kind of device; None if it is seen on the way that they do not fit into the room."""
    config, times = shape.config, shape.micro_batches
    policy = Depths(model, lambda copy: _prepared(copy, config))
    standing = policy.each(lambda copy: _standing(copy, shape))
    saved, gathered, gradients = (standing.pop(name) for name in ("saved", "gathered", "gradients"))
    columns, sizes = shape.prompt + config.max_new_tokens, policy.each(weight_bytes)
    together = prompts_at_once(model, config, shape.precision, columns, **sizes)
    shape = replace(shape, sampled_at_once=min(shape.prompts, together))
    standing["reward model"] = sum(_whole(judge) for judge in judges if judge is not model)
    # ids and mask; sampled, log-probability, kept; twice: as they were sampled, and cut into micro-batches
    row = columns * 16 + config.max_new_tokens * (5 + 8 * shape.kept)
    standing["rollouts"] = 2 * shape.prompts * config.num_generations_per_prompt * row

    def phase(name: str, counts: list[Count], work: list[tuple[float, list[Work]]], **stays: int) -> Phase:
        parts = dict.fromkeys(PARTS, 0) | standing | stays
        highest = max((count.peak for count in counts), key=lambda peak: sum(peak.values()), default={})
        return Phase(name, {part: parts[part] + highest.get(part, 0) for part in parts}, work)

    # what nearly always decides comes first
    if sum(standing.values()) > room:
        return None
    stays = {"weights": standing["weights"] + gathered, "gradients": gradients + gathered}
    if times == 1 and shape.shards == 1:
        stays["gradients"] = 0  # they arise as the activations go
    count = policy.each(lambda copy: _update(copy, shape))
    adam = Work(0, gradients // 4 * ADAM_TRAFFIC)
    update = phase("update", [count], [*_repeated(times, count), (1, [adam])], **stays)
    if sum(update.parts.values()) > room:
        return None

    captures = can_capture(torch.device(device), config.max_new_tokens)
    reading, *tokens = policy.each(lambda copy: _sampling(copy, shape, captures=captures))
    groups = shape.prompts / shape.sampled_at_once
    each = groups * (config.max_new_tokens - 1) / len(tokens)
    work = [*_repeated(groups, reading), *(part for token in tokens for part in _repeated(each, token))]
    ours = config.sampler != "vllm"  # whose cache is counted with the machine
    sampling = phase("sampling", [reading, tokens[-1]] if ours else [], work)

    scored = []
    if config.kl_coef > 0:
        scored.append(policy.each(lambda copy: _scoring(copy, shape, as_reference=True)))
    if config.kl_coef > 0 and config.kl_in == "reward":
        scored.append(policy.each(lambda copy: _scoring(copy, shape)))
    scored += [Depths(judge).each(lambda copy: _judging(copy, shape)) for judge in judges]
    work = [part for count in scored for part in _repeated(times, count)]
    scoring = phase("scoring", scored, work)
    saving = [phase("saving", [], [], weights=standing["weights"] + saved)] if saved and device != "cuda" else []
    return [sampling, scoring, update, *saving]


def _repeated(times: float, count: Count) -> list[tuple[float, list[Work]]]:
    return [(times * often, work) for often, work in count.work]


def _prepared(policy: nn.Module, config: GRPOConfig) -> nn.Module:
    """The policy as the trainer prepares it."""
    if config.lora_rank:
        with torch.device("meta"):
            policy = add_lora(policy, rank=config.lora_rank, alpha=config.lora_alpha, seed=0)
    trainable_in_float32(policy)
    if config.disable_dropout:
        disable_dropout(policy)
    if config.gradient_checkpointing:
        enable_checkpointing(policy)
    asked, stage = _stage(policy)
    with stage:  # once where its head begins, and not with each of the copies
        completion_states(asked, *2 * [torch.ones(1, 2, dtype=torch.long)], 1)
    return built_like(policy, asked)


def _standing(policy: nn.Module, shape: _Shape) -> dict[str, int]:
    """The bytes of all that stays, and of what joins it for a while: gathered from shards, made to be saved."""
    whole, trained = _whole(policy), [p for p in policy.parameters() if p.requires_grad]
    gradients = size_of(trained) // shape.shards
    adapted = [m for m in policy.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    saved, gathered = size_of(layer.base_layer.weight for layer in adapted), 0  # merged, in main memory
    if shape.shards > 1:  # what belongs to no layer; the layer that computes, and the next one, on its way
        layers = [m for m in policy.modules() if type(m).__name__ in (policy._no_split_modules or ())]
        sizes = [size_of(layer.parameters()) for layer in layers]
        saved = _optimizer(trained, shape.config)  # whole, by the first process
        gathered = size_of(policy.parameters()) - sum(sizes) + 2 * max(sizes, default=0)
    return {
        "weights": whole + (gradients if shape.shards > 1 else 0),  # beside shards, a whole copy to sample from
        "gradients": gradients,
        "optimizer": _optimizer(trained, shape.config) // shape.shards,
        "reference": whole if shape.config.kl_coef > 0 and not is_adapted(policy) else 0,
        "saved": saved,
        "gathered": gathered,
    }


def _optimizer(trained: list[nn.Parameter], config: GRPOConfig) -> int:
    """Bytes of AdamW's two averages; in 8 bits with a scale for 256 of them, but for small weights as ever."""
    if config.optimizer == "adamw":
        return 2 * size_of(trained)
    return sum(8 * p.numel() if p.numel() < 4096 else 2 * p.numel() + 8 * -(-p.numel() // 256) for p in trained)


def _whole(model: nn.Module) -> int:
    return size_of([*model.parameters(), *model.buffers()])


def _stage(model: nn.Module, *, trains: bool = True) -> tuple[nn.Module, Rehearsal]:
    stage = Rehearsal()
    hollow = emptied(model, stage.fake)
    stage.watch(hollow)
    return hollow if trains else hollow.requires_grad_(False), stage


def _counted(stage: Rehearsal, cache: object = None) -> Count:
    layers = getattr(cache, "layers", ())
    held = size_of(x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() > 1)
    return Count(stage.moments, [(1, stage.work)], held)


def _sampling(policy: nn.Module, shape: _Shape, *, captures: bool) -> list[Count]:
    """The reading of the prompts, and a token: the one that is captured, or the first and the last."""
    config, K = shape.config, shape.config.num_generations_per_prompt
    model, stage = _stage(policy, trains=shape.shards == 1)
    ids, mask = shape.rows(shape.sampled_at_once, shape.prompt + config.max_new_tokens)
    with stage, torch.no_grad(), shape.autocast():
        model.eval()
        says = Growing(model, ids[::K, : shape.prompt], mask[::K, : shape.prompt], K)
        counts = [_counted(stage, says.cache)]
        if captures and (fixed := _captured(model, says, K, ids.shape[1])) is not None:
            stage.reset()
            _one_token(fixed, ids, config)
            return [*counts, _counted(stage, fixed.cache)]
        stage.reset()
        _one_token(says, ids, config)
        counts.append(_counted(stage))
        stage.reset()
        del says
        columns = max(1, ids.shape[1] - 2)  # as it stands before the last token that is read: the one after is not
        says = Growing(model, ids[:, :columns], mask[:, :columns], 1)
        stage.reset()
        _one_token(says, ids, config)
        return [*counts, _counted(stage, says.cache)]


def _captured(model: nn.Module, grown: Growing, num_generations: int, columns: int) -> Captured | None:
    try:
        says = Captured(model, len(grown.place), columns, torch.device("cpu"))
        says.start(grown, num_generations)
    except (ValueError, TypeError, AttributeError, RuntimeError):  # as decoding.decoder: it goes on without
        return None
    return says


def _one_token(says: Growing | Captured, ids: Tensor, config: GRPOConfig) -> None:
    """What `sample` does at each step, with all that it holds meanwhile."""
    logits = says.logits[says.place]
    kept = truncate(logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    uniforms = torch.rand(len(logits))
    chosen = pick(logits, uniforms, temperature=config.temperature, kept=kept)
    one_step = None if kept is None else kept[:, None]
    drawn = token_logprobs(logits[:, None], chosen[:, None], temperature=config.temperature, kept=one_step)
    says.advance(torch.ones(len(ids), dtype=torch.bool), ids[:, -1])
    del drawn


def _scoring(policy: nn.Module, shape: _Shape, *, as_reference: bool = False) -> Count:
    adapted = as_reference and is_adapted(policy)  # the policy is its own reference
    model, stage = _stage(policy, trains=shape.shards == 1 and (adapted or not as_reference))
    inputs, how = shape.micro_batch()
    with stage, torch.no_grad(), shape.autocast():
        model.eval()
        with model.disable_adapter() if adapted else nullcontext():
            completion_logprobs(model, *inputs, **how)
    return _counted(stage)


def _judging(judge: nn.Module, shape: _Shape) -> Count:
    model, stage = _stage(judge)
    (ids, mask, tokens), _ = shape.micro_batch()
    with stage, torch.no_grad():
        model.eval()
        if "SequenceClassification" in type(judge).__name__:
            model(input_ids=ids, attention_mask=mask)
        else:
            completion_logprobs(model, ids, mask, tokens)
    return _counted(stage)


def _update(policy: nn.Module, shape: _Shape) -> Count:
    config = shape.config
    model, stage = _stage(policy)
    if shape.shards > 1:  # each goes into the shards as soon as it is there
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    elif shape.micro_batches > 1:  # there are the gradients of the micro-batches before
        with stage.fake:
            for weight in model.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        stage.watch(model)
    inputs, how = shape.micro_batch()
    ids, _, tokens = inputs
    before = torch.zeros(len(ids), tokens)
    with stage:
        model.train()
        with shape.autocast():
            scores = completion_scores(model, *inputs, **how)
        terms = grpo_loss(
            scores.logprobs,
            before if config.num_iterations > 1 else None,
            torch.zeros(len(ids)),
            torch.ones(len(ids), tokens, dtype=torch.bool),
            ref_logprobs=before if config.kl_coef > 0 else None,
            kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimator,
            importance=config.importance,
            surrogate=config.surrogate,
            aggregation=config.aggregation,
            constant=config.aggregation_constant or tokens,
        )
        stage.backward = True
        terms.loss.backward()
    return _counted(stage)


# --- what would fit -----------------------------------------------------------------------------------------


def nearest(found: Plan, model: nn.Module, *, reward_model: nn.Module | Sequence | None = None) -> Plan | None:
    """The plan that fits with the fewest changes: first those that change no number, then LoRA, then K, then length.

    kl_coef is left alone, though 0 would need no reference: it is part of what is trained for.

    Args:
        found: a plan that does not fit.
        model, reward_model: as they were given to `plan`.
    Returns: None if nothing does: take a smaller model.
    """
    machine, judges = found.machine, _judges(reward_model)

    @cache
    def tried(level: int, number: int) -> Plan | None:
        config = found.config.replace(**levels[level][number])
        shape = _Shape.of(config, model, found.precision, found.prompt_tokens, found.processes)
        phases = _rehearse(shape, model, judges, machine.device, machine.memory - machine.taken)
        new = phases and replace(found, config=config, rehearsed=tuple(phases))
        return new if new and new.fits else None

    levels = _levels(found.config, can_adapt=not is_adapted(model))
    for level, changes in enumerate(levels):
        last = len(changes) - 1
        if tried(level, last) is not None:
            return tried(level, bisect_left(range(last), True, key=lambda i: tried(level, i) is not None))
    return None


def _levels(config: GRPOConfig, *, can_adapt: bool) -> list[list[dict[str, Any]]]:
    """Changes from the mildest to the hardest; within a level, each needs less memory than the one before."""
    prompts = config.prompts_per_step
    smaller = [{"batch_size": b, "gradient_accumulation_steps": prompts // b}
               for b in range(config.batch_size - 1, 0, -1) if config.batch_size % b == 0]  # fmt: skip
    recompute = [] if config.gradient_checkpointing else [{"gradient_checkpointing": True}]
    adapt = [{"lora_rank": 16}] if can_adapt and config.lora_rank is None else []
    levels = [smaller] if smaller else []
    levels += [[change, *(change | size for size in smaller)] for change in recompute]
    for adapter in adapt:
        levels.append([adapter, *(adapter | size for size in smaller)])
        levels += [[adapter | change, *(adapter | change | size for size in smaller)] for change in recompute]
    hardest = levels[-1][-1] if levels else {}
    K, tokens = config.num_generations_per_prompt, config.max_new_tokens
    fewer = [hardest | {"num_generations_per_prompt": k} for k in _halves(K, 2)]
    hardest = fewer[-1] if fewer else hardest
    shorter = [hardest | {"max_new_tokens": t} for t in _halves(tokens, 16)]
    return levels + [level for level in (fewer, shorter) if level]


def _halves(value: int, least: int) -> list[int]:
    return [value // 2**i for i in range(1, value.bit_length()) if value // 2**i >= least]


def what_fits(found: Plan, model: nn.Module, reward_model: nn.Module | Sequence | None = None) -> str:
    """In a sentence, with the flags of the command line, the nearest plan that fits."""
    near = nearest(found, model, reward_model=reward_model)
    if near is None:
        return f"Nothing near it fits on {found.machine.name}: a smaller model, or {_larger(found)}."
    before, after = found.config.to_dict(), near.config.to_dict()
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in after.items() if value != before[name])
    return f"What fits: {' '.join(flags).replace(' True', '')} ({near.peak / GIB:.2f} GiB)."


def _larger(found: Plan) -> str:
    room = sorted((m for m in MACHINES.values() if m.device == "cuda"), key=lambda machine: machine.memory)
    return next(
        (f"a machine like {m.name}" for m in room if m.memory > found.peak), "several GPUs, as in docs/MOVING_ON.md"
    )


def without_weights(name: str, *, judges: bool = False, trust_remote_code: bool = False) -> nn.Module:
    """A model on the meta device, of a shape that is known here, or from the config.json of a folder or a Hub id.

    Args:
        name: "pocket", one of SHAPES, a folder or a Hub id.
        judges: a sequence-classification model, not a causal LM.
    Raises: ValueError if there is no config to be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

    if name in SHAPES and not judges:
        hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[name]
        config = Qwen2Config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=hidden < 3584,
            max_position_embeddings=32768, dtype="bfloat16",
        )  # fmt: skip
    else:
        try:
            folder = pocket.WEIGHTS if name == "pocket" else name
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"could not read the shape of {name} ({type(error).__name__}: {first_line[:200]}). Without a network: "
                f"a folder with a config.json, pocket, {', '.join(SHAPES)}."
            ) from error
    kind = AutoModelForSequenceClassification if judges else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=trust_remote_code)
