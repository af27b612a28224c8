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
class MicroBatch:
    """Some groups of a batch, as tensors."""

    rollouts: Rollouts
    rows: Tensor
    """[B] long, which completions of the batch these are."""
    no_gradient: bool = False
    """True if no gradient comes from here: all advantages are 0, and there is no KL penalty."""
    ref_logprobs: Tensor | None = None
    """[B, T] in nats under the reference; None where no KL is wanted."""
    old_logprobs: Tensor | None = None
    """[B, T] in nats as of the first update on this batch; None until then."""
    advantages: Tensor | None = None
    """[B], or [B, T] where gamma < 1."""

    def select(self, start: int, size: int) -> "MicroBatch":
        """Some of the rows, next to each other."""
        some = slice(start, start + size)
        tensors = {f.name: v[some] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        rollouts = {
            f.name: v if v is None else v[some] for f in fields(Rollouts) for v in [getattr(self.rollouts, f.name)]
        }
        return replace(self, rollouts=Rollouts(**rollouts), **tensors)

    def token_rows(self) -> Iterator[tuple[int, dict[str, list]]]:
        """Each completion's row, its tokens and their log-probabilities in nats, to four decimals, to be logged."""
        columns = {"completion_ids": self.rollouts.completion_ids, "logprobs": self.rollouts.logprobs}
        if self.ref_logprobs is not None:
            columns["ref_logprobs"] = self.ref_logprobs
        lengths = self.rollouts.completion_mask.sum(1).tolist()
        lists = {name: values.tolist() for name, values in columns.items()}  # whole: a slice of a tensor takes longer
        for i, (row, n) in enumerate(zip(self.rows.tolist(), lengths, strict=True)):
            yield row, {name: [round(x, 4) for x in values[i][:n]] for name, values in lists.items()}


def make_micro_batches(rollouts: Rollouts, num_generations: int, budget: int, no_gradient: Tensor) -> list[MicroBatch]:
    """Micro-batches of whole groups, each with as many as fit into a budget of tokens, padding included.

    Groups of like length stand together, so little is padding; those that are no_gradient stand apart.

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
    if all(without for without, _ in parts):  # the optimizer wants a gradient, if of zeros: its averages go on
        parts[0] = (False, parts[0][1])
    rows = [(without, groups[some].flatten()) for without, some in parts]
    return [MicroBatch(rollouts.select(r.to(rollouts.ended.device)), r, without) for without, r in rows]


@dataclass
class Batch:
    """All that one rollout gave; used for num_iterations optimizer steps."""

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
        """As plain values, and tensors in main memory: another process's GPU is not for these."""

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
        """What this process has of a batch, given what each process has `saved` of it; None of nothing.

        With another number of processes the groups are shared out anew.
        """
        if not isinstance(saved, list):
            raise TypeError("the batch is none")
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
