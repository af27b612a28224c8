"""A batch: all completions of one rollout with their advantages, cut into micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from grpo_lab.hardware.processes import Processes
from grpo_lab.rollout.sampling import Rollouts


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did."""

    step: int
    """Counts from 1."""
    metrics: dict[str, float]
    """See grpo_lab.training.metrics.METRICS."""
    completions: list[dict[str, Any]]
    """One per completion: prompt, completion, reward, rewards of each function, advantage, and its tokens with their
    log-probabilities (`token_rows`)."""


@dataclass
class UnfinishedStep:
    """An optimizer step that has changed the weights and is not yet evaluated, logged and saved."""

    record: StepRecord
    log_begun: bool = False
    """Whether rows of it may be in the log files."""
    logged: bool = False

    @classmethod
    def restored(cls, saved: dict[str, Any] | None) -> "UnfinishedStep | None":
        """Return the step that a checkpoint holds (the fields of its record), or None."""
        if saved is None:
            return None
        if not isinstance(saved, dict):
            raise TypeError(f"unfinished must be a dict, got {type(saved).__name__}")
        return cls(StepRecord(**saved))


@dataclass
class MicroBatch:
    """Some groups of a batch, as tensors: the rows of one forward and backward pass."""

    rollouts: Rollouts
    rows: Tensor
    """[B] long, the indices of these completions in the batch."""
    no_gradient: bool = False
    """True if the gradient is zero: all advantages are 0, and there is no KL penalty."""
    ref_logprobs: Tensor | None = None
    """[B, T] log-probabilities in nats under the reference; None if there is no KL term."""
    old_logprobs: Tensor | None = None
    """[B, T] log-probabilities in nats at the first update on this batch; None before it."""
    advantages: Tensor | None = None
    """[B], or [B, T] where gamma < 1."""

    def select(self, start: int, size: int) -> "MicroBatch":
        """Return `size` neighbouring rows."""
        some = slice(start, start + size)
        tensors = {f.name: v[some] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        rollouts = {
            f.name: v if v is None else v[some] for f in fields(Rollouts) for v in [getattr(self.rollouts, f.name)]
        }
        return replace(self, rollouts=Rollouts(**rollouts), **tensors)

    def token_rows(self) -> Iterator[tuple[int, dict[str, list]]]:
        """Yield each completion's index, its tokens and their log-probabilities in nats (4 decimals), for the log."""
        columns = {"completion_ids": self.rollouts.completion_ids, "logprobs": self.rollouts.logprobs}
        if self.ref_logprobs is not None:
            columns["ref_logprobs"] = self.ref_logprobs
        lengths = self.rollouts.completion_mask.sum(1).tolist()
        lists = {name: values.tolist() for name, values in columns.items()}
        for i, (row, n) in enumerate(zip(self.rows.tolist(), lengths, strict=True)):
            yield row, {name: [round(x, 4) for x in values[i][:n]] for name, values in lists.items()}


def make_micro_batches(rollouts: Rollouts, num_generations: int, budget: int, no_gradient: Tensor) -> list[MicroBatch]:
    """Cut a batch into micro-batches of whole groups, as many as fit into a budget of tokens, padding included.

    Groups of similar length go together, so that there is little padding; groups without gradient go apart.

    Args:
        budget: tokens at a time; a group that is larger alone is a micro-batch of its own.
        no_gradient: [P] bool, groups without a gradient.
    """
    everything = torch.arange(len(rollouts.ended))
    if rollouts.input_ids.numel() <= budget and not no_gradient.any():
        return [MicroBatch(rollouts, everything)]
    groups = everything.view(-1, num_generations)
    prompts = rollouts.attention_mask[::num_generations, : -rollouts.num_tokens].sum(1).tolist()
    longest = rollouts.completion_mask.sum(1).view(-1, num_generations).amax(1).tolist()
    parts: list[tuple[bool, list[int]]] = []
    width = 0
    for group in sorted(range(len(groups)), key=lambda g: (bool(no_gradient[g]), longest[g], prompts[g])):
        width = max(width, prompts[group])
        fits = parts and (len(parts[-1][1]) + 1) * num_generations * (width + longest[group]) <= budget
        if not fits or parts[-1][0] != no_gradient[group]:
            parts.append((bool(no_gradient[group]), []))
            width = prompts[group]
        parts[-1][1].append(group)
    if all(without for without, _ in parts):  # Adam must take its step, on zeros: its running means decay
        parts[0] = (False, parts[0][1])
    rows = [(without, groups[some].flatten()) for without, some in parts]
    return [MicroBatch(rollouts.select(r.to(rollouts.ended.device)), r, without) for without, r in rows]


@dataclass
class Batch:
    """All completions of one rollout; used for num_iterations optimizer steps."""

    parts: list[MicroBatch]
    completions: list[dict[str, Any]]
    metrics: dict[str, float]
    updates: int = 0
    """Optimizer steps made on it so far."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and completions, on this process."""
        return sum(int(part.rollouts.attention_mask.sum()) for part in self.parts)

    def saved(self) -> dict[str, Any]:
        """Return plain values and CPU tensors, which a process with any device can load."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(v) for name, v in value.items()}
            return value.cpu() if isinstance(value, Tensor) else value

        parts = [{f.name: plain(getattr(part, f.name)) for f in fields(part)} for part in self.parts]
        parts = [{**part, "rollouts": plain(vars(part["rollouts"]))} for part in parts]
        return {**vars(self), "parts": parts}

    @classmethod
    def restored(
        cls, saved: list[dict[str, Any]], processes: Processes, num_generations: int, device
    ) -> "Batch | None":
        """Return this process's part of a saved batch, or None if none was saved.

        With another number of processes the groups are divided anew.

        Args:
            saved: what `saved` returned on each rank.
        """
        if not isinstance(saved, list):
            raise TypeError(f"batch must be a list, got {type(saved).__name__}")
        if not saved:
            return None

        def part(values: dict[str, Any]) -> MicroBatch:
            values = {"no_gradient" if k == "idle" else k: v for k, v in values.items()}  # as version 0.1 called it
            tensors = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
            return MicroBatch(**{**values, **tensors, "rollouts": Rollouts(**values["rollouts"]).to(device)})

        if len(saved) == processes.world_size:
            mine = saved[processes.rank]
            return cls(**{**mine, "parts": [part(values) for values in mine["parts"]]})
        parts = [part(values) for batch in saved for values in batch["parts"]]
        groups = [(p, start) for p in parts for start in range(0, len(p.rows), num_generations)]
        mine = [
            p.select(start, num_generations) for p, start in (groups[i] for i in processes.shard_range(len(groups)))
        ]
        return cls(**{**saved[0], "parts": mine})
