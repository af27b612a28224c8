"""Backward pass, optimizer step and their state, for a model in one process, replicated in several, or sharded."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from transformers import get_scheduler

from grpo_lab.hardware.processes import Processes
from grpo_lab.hardware.system import return_freed_memory
from grpo_lab.training.batches import MicroBatch
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.optimizer import make_optimizer
from grpo_lab.training.policy import PolicyModels
from grpo_lab.training.shards import (
    gather_state,
    gather_weights,
    pad_micro_batches,
    scatter_state,
    scatter_weights,
    shard,
    to_full_tensor,
)


class HasLoss(Protocol):
    """What `Engine.accumulate` differentiates."""

    loss: Tensor


Terms = TypeVar("Terms", bound=HasLoss)


class Engine:
    """Accumulates gradients over micro-batches and takes optimizer steps; each process has a replica of the model.

    Args:
        models: the policy is trained in place.
        total_steps: of the run, for the learning-rate schedule.
    Raises: ValueError if there is nothing to train or the optimizer cannot be had.
    """

    def __init__(
        self,
        models: PolicyModels,
        config: GRPOConfig,
        accelerator: Accelerator,
        processes: Processes,
        total_steps: int,
    ):
        self.models, self.config, self.accelerator, self.processes = models, config, accelerator, processes
        optimizer = make_optimizer(models.trained, config, models.device)
        self.scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps
        )
        self.optimizer: Optimizer = accelerator.prepare(optimizer)
        self.skipped_steps = self.skipped_in_a_row = 0

    skips_no_gradient = True
    """Whether a micro-batch without gradient may be left out of the backward pass."""

    def accumulate(
        self, parts: Sequence[MicroBatch], compute: Callable[[MicroBatch], Terms]
    ) -> Iterator[tuple[MicroBatch, Terms]]:
        """Add up the gradients of all micro-batches.

        Args:
            compute: micro-batch -> the terms of its loss, already divided by totals over the whole batch.
        Yields: each micro-batch with its terms, after its backward pass.
        """
        self.optimizer.zero_grad()  # whatever an interrupted step or an earlier cell left there
        for part in parts:
            with torch.set_grad_enabled(not part.no_gradient):
                terms = compute(part)
            if not part.no_gradient:
                self._backward(terms.loss)
            yield part, terms

    def _backward(self, loss: Tensor) -> None:
        # not accelerate's, which divides by how many steps its environment, or another trainer here, accumulates over
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def step(self, number: int) -> float:
        """Take one optimizer step, or skip it if the gradient is not finite.

        Args:
            number: of the step, for the message.
        Returns: the gradient's norm before clipping.
        Raises: ArithmeticError after `max_skipped_steps` skipped steps in a row.
        """
        scaler = self.accelerator.scaler
        self.processes.all_reduce_gradients(self.models.trained)
        parameters = self.models.trained.parameters()
        norm = to_full_tensor(self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)).item()
        still_scaling = scaler is not None and scaler.get_scale() > 1
        if math.isfinite(norm) or scaler is not None:  # a scaler skips by itself, and must see it
            self.optimizer.step()
            self._after_update()
        self.optimizer.zero_grad()  # sampling needs the memory
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.scheduler.step()
            return norm
        self.skipped_steps += 1
        self.skipped_in_a_row += not still_scaling  # fp16 finds its scale by trying
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            precision = self.models.precision
            raise ArithmeticError(
                f"the gradient was not finite in {self.skipped_in_a_row} steps in a row (the last: step {number}). "
                "The weights are as they were before. Lower --learning-rate"
                f"{'' if precision == 'fp32' else f', or use --precision fp32 instead of {precision}'}."
            )
        return norm

    def _after_update(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer, schedule and loss scaling, for a checkpoint."""
        scaler = self.accelerator.scaler
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": gather_state(self.optimizer, self.processes),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state; the policy's weights (`models.whole`) have been loaded already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


class ShardedEngine(Engine):
    """Weights, gradients and optimizer state sharded between the processes by FSDP.

    `models.trained` becomes the sharded policy, `models.whole` an unsharded copy that samples.
    """

    skips_no_gradient = False  # a forward pass of shards needs all processes

    def __init__(self, models: PolicyModels, config: GRPOConfig, accelerator: Accelerator, processes: Processes, *rest):
        models.whole, models.score = shard(models.trained, models.score, processes, models.device)
        if models.device.type == "cpu":
            return_freed_memory()  # layers come and go whole, and would leave the heap in pieces
        super().__init__(models, config, accelerator, processes, *rest)

    def accumulate(self, parts, compute):
        """Add up the gradients; every process makes the same number of passes."""
        self.optimizer.zero_grad()
        for part, factor in pad_micro_batches(parts, self.processes):
            terms = compute(part)
            self._backward(terms.loss * factor)
            if factor:
                yield part, terms

    def _after_update(self) -> None:
        gather_weights(self.models.trained, self.models.whole)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state, sharding weights and optimizer state again."""
        scatter_weights(self.models.whole, self.models.trained)
        super().load_state_dict({**state, "optimizer": scatter_state(state["optimizer"], self.optimizer)})


def make_engine(
    models: PolicyModels, config: GRPOConfig, accelerator: Accelerator, processes: Processes, total_steps: int
) -> Engine:
    """Return the engine for this run: sharded with `fsdp` and several processes, else with replicas."""
    kind = ShardedEngine if config.fsdp and processes.world_size > 1 else Engine
    return kind(models, config, accelerator, processes, total_steps)
