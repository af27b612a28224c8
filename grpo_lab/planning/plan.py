"""Will it fit, and how long will a step take? Known before the first weight is loaded.

`plan(config, model)` is what the phases of a step take (phases.py) on a machine (machines.py), with what Python or the
GPU's driver take; `nearest` looks for the run most like it that fits.
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
from grpo_lab.planning.machines import GIB, MACHINES, Machine, named_machine, precision_on, this_machine
from grpo_lab.planning.phases import PARTS, Phase, Shape, rehearse
from grpo_lab.planning.rehearsal import size_of
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
    """What a run needs. `str(plan)` is a table."""

    name: str
    """Of the model."""
    config: GRPOConfig
    machine: Machine
    precision: str
    prompt_tokens: int
    rehearsed: tuple[Phase, ...]
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
        precision = precision_on(machine, self.config)
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
    precision = precision_on(machine, config)
    phases = rehearse(Shape.of(config, model, precision, prompt_tokens, processes), model, judges, device)
    loaded = [t for m in (model, *judges) for t in (*m.parameters(), *m.buffers()) if t.device.type == "cpu"]
    # last: what the rehearsal leaves behind is taken, too
    machine = machine or this_machine(config, size_of(loaded), processes)
    name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
    return Plan(name, config, machine, precision, prompt_tokens, tuple(phases), processes)


def _judges(reward_model: nn.Module | Sequence | None) -> list[nn.Module]:
    judges = reward_model if isinstance(reward_model, list | tuple) else [reward_model]
    models = [judge if isinstance(judge, nn.Module) else getattr(judge, "model", None) for judge in judges]
    return [model for model in models if isinstance(model, nn.Module)]


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
        shape = Shape.of(config, model, found.precision, found.prompt_tokens, found.processes)
        phases = rehearse(shape, model, judges, machine.device, machine.memory - machine.taken)
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
