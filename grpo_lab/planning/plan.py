"""Estimate whether a run fits into memory and how long a step takes, before any weights are loaded.

`plan(config, model)` combines the cost of the phases of a step (phases.py) with a machine (machines.py); `nearest`
searches for the most similar run that fits.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from grpo_lab import pocket
from grpo_lab.hardware.devices import resolve_device
from grpo_lab.models.adapters import is_adapted
from grpo_lab.planning.dry_run import size_of
from grpo_lab.planning.machines import GIB, MACHINES, Machine, named_machine, precision_on, this_machine
from grpo_lab.planning.phases import CATEGORIES, Phase, Shape, simulate_step
from grpo_lab.training.config import GRPOConfig

PROMPT_TOKENS = 128

# config.json of Qwen/Qwen2.5-*-Instruct: hidden size, layers, heads, key-value heads, intermediate size, vocabulary
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064),
}


@dataclass(frozen=True)
class Plan:
    """Estimated memory and time of a run. `str(plan)` is a table."""

    name: str
    """Name of the model."""
    config: GRPOConfig
    machine: Machine
    precision: str
    prompt_tokens: int
    simulated: tuple[Phase, ...]
    processes: int = 1
    """World size. The plan is for one process, which has its own GPU or its part of the main memory."""

    @cached_property
    def phases(self) -> dict[str, dict[str, int]]:
        """Phase of a step -> category -> bytes at the highest point of the phase."""
        # on a CPU with checkpointing or FSDP, hardware.system.return_freed_memory makes the allocator keep nothing
        sharded = self.config.fsdp and self.processes > 1
        kept = self.machine.device != "cpu" or not (self.config.gradient_checkpointing or sharded)
        return {phase.name: phase.on(self.machine, self.machine.reserve * kept) for phase in self.simulated}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Phase of a step -> upper bound of its time, for all micro-batches together."""
        return {phase.name: phase.seconds(self.machine, self.precision) for phase in self.simulated}

    def on(self, machine: str | Machine) -> "Plan":
        """Return the same plan for another machine, without another dry run.

        Raises: ValueError if the kind of device differs, or only one of the two would use fp32.
        """
        if not isinstance(machine, Machine):
            machine = named_machine(machine).part_for(self.config, self.processes)
        precision = precision_on(machine, self.config)
        if (machine.device, precision == "fp32") != (self.machine.device, self.precision == "fp32"):
            raise ValueError(
                f"a plan for {self.machine.name} ({self.machine.device}, {self.precision}) cannot be moved to "
                f"{machine.name} ({machine.device}, {precision}). Call plan() with that machine."
            )
        return replace(self, machine=machine, precision=precision)

    @property
    def highest(self) -> str:
        """Name of the phase that needs the most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes at the highest point of a step."""
        return sum(self.phases[self.highest].values())

    @property
    def fits(self) -> bool:
        """Return True if the peak is within the machine's memory."""
        return self.peak <= self.machine.memory

    @property
    def verdict(self) -> str:
        """Return one sentence that says whether the run fits, and how long a step takes."""
        share = self.peak / self.machine.memory
        words = "does not fit" if share > 1 else "fits, but barely" if share > 1 / 1.15 else "fits"
        return (
            f"{words}: {self.peak / GIB:.2f} of {self.machine.memory / GIB:.2f} GiB on {self._where}, "
            f"highest in {self.highest}; up to {_time(sum(self.seconds.values()))} a step"
        )

    @property
    def _where(self) -> str:
        return self.machine.name + (f", each of {self.processes} processes" if self.processes > 1 else "")

    def __str__(self) -> str:
        config, rows = self.config, [key for key in CATEGORIES if any(phase[key] for phase in self.phases.values())]
        settings = f"K {config.num_generations_per_prompt} × {config.batch_size} prompts at a time"
        lengths = f"{self.prompt_tokens} + {config.max_new_tokens} tokens, {self.precision}"
        lines = [f"{self.name} on {self._where}: {settings}, {lengths}", ""]
        lines.append(f"{'GiB':17}" + "".join(f"{phase:>12}" for phase in self.phases))
        for key in rows:
            lines.append(f"{key:17}" + "".join(f"{phase[key] / GIB:12.2f}" for phase in self.phases.values()))
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
    """Estimate the memory and the time of a run. Takes seconds for billions of weights, and allocates none of them.

    Args:
        config: None means the defaults.
        model: the policy as the trainer takes it; a model on the meta device, without weights, is enough.
        reward_model: as the trainer takes it; reward functions need no memory.
        machine: a Machine or the name of one of MACHINES; None means this machine, with its free memory.
        prompt_tokens: length of the longest prompt; None means 128, or less if the model's context is shorter.
        processes: world size; the processes have a GPU each or share the main memory. The plan is for one of them.
        name: name of the model in the table.
    Returns: the Plan of one process.
    Raises: ValueError for an unknown machine, lengths above the model's context, or fewer prompts than processes.
    """
    config = config or GRPOConfig()
    if not 1 <= processes <= config.prompts_per_step:
        raise ValueError(
            f"processes must be at least 1 and at most {config.prompts_per_step}, the number of prompts per step, "
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
    reward_models = _reward_models(reward_model)
    precision = precision_on(machine, config)
    phases = simulate_step(Shape.of(config, model, precision, prompt_tokens, processes), model, reward_models, device)
    loaded = [t for m in (model, *reward_models) for t in (*m.parameters(), *m.buffers()) if t.device.type == "cpu"]
    # after the dry run, so that memory which it leaves in use is counted
    machine = machine or this_machine(config, size_of(loaded), processes)
    name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
    return Plan(name, config, machine, precision, prompt_tokens, tuple(phases), processes)


def _reward_models(reward_model: nn.Module | Sequence | None) -> list[nn.Module]:
    """Return the modules among the rewards, including those wrapped in a reward such as CausalLMReward."""
    rewards = reward_model if isinstance(reward_model, list | tuple) else [reward_model]
    models = [reward if isinstance(reward, nn.Module) else getattr(reward, "model", None) for reward in rewards]
    return [model for model in models if isinstance(model, nn.Module)]


# --- the nearest run that fits ------------------------------------------------------------------------------


def nearest(found: Plan, model: nn.Module, *, reward_model: nn.Module | Sequence | None = None) -> Plan | None:
    """Return the plan that fits with the mildest changes: micro-batch and checkpointing, then LoRA, K and length.

    kl_coef stays as it is, although 0 would save the reference: it is part of the training objective.

    Args:
        found: a plan that does not fit.
        model, reward_model: as given to `plan`.
    Returns: None if nothing fits: use a smaller model.
    """
    machine, reward_models = found.machine, _reward_models(reward_model)

    @cache
    def plan_if_fits(level: int, number: int) -> Plan | None:
        config = found.config.replace(**levels[level][number])
        shape = Shape.of(config, model, found.precision, found.prompt_tokens, found.processes)
        phases = simulate_step(shape, model, reward_models, machine.device, machine.memory - machine.taken)
        new = phases and replace(found, config=config, simulated=tuple(phases))
        return new if new and new.fits else None

    levels = _levels(found.config, can_adapt=not is_adapted(model))
    for level, changes in enumerate(levels):
        last = len(changes) - 1
        if plan_if_fits(level, last) is not None:
            first = bisect_left(range(last), True, key=lambda i: plan_if_fits(level, i) is not None)
            return plan_if_fits(level, first)
    return None


def _levels(config: GRPOConfig, *, can_adapt: bool) -> list[list[dict[str, Any]]]:
    """Return changes of the config, mildest level first; within a level, each needs less memory than the one before."""
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
    """Return value / 2, value / 4, ..., down to `least`."""
    return [value // 2**i for i in range(1, value.bit_length()) if value // 2**i >= least]


def what_fits(found: Plan, model: nn.Module, reward_model: nn.Module | Sequence | None = None) -> str:
    """Return one sentence with the command-line flags of the nearest plan that fits."""
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
    """Return a model on the meta device, built from SHAPES or from the config.json of a folder or a Hub id.

    Args:
        name: "pocket", one of SHAPES, a folder or a Hub id.
        judges: True for a sequence-classification model, False for a causal LM.
    Raises: ValueError if the config cannot be read.
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
                f"could not read the config of {name} ({type(error).__name__}: {first_line[:200]}). Without a network, "
                f"use a folder with a config.json, pocket, {', '.join(SHAPES)}."
            ) from error
    kind = AutoModelForSequenceClassification if judges else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=trust_remote_code)
