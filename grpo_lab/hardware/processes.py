"""Data parallelism: each rank takes whole groups of every step, and every mean is taken over all ranks.

    accelerate launch -m grpo_lab.train_grpo ...       one process per GPU
    torchrun --nproc-per-node 2 -m grpo_lab.train_grpo --device cpu ...

N processes therefore end with the same weights as one process, within rounding, and a run can be resumed with another
world size. Each rank holds the whole model, and gradients are all-reduced. With `fsdp`, weights, gradients and
optimizer state are sharded for the update; each rank also keeps a full copy of the weights for sampling.

All ranks start from rank 0's weights and must have the same data. Random numbers of dropout and of reward functions
differ between ranks, and with the world size.

PyTorch's DDP is not used. It would overlap communication and backward pass, but needs the same number of backward
passes on every rank, and here the number of micro-batches depends on the lengths of the completions.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import distributed, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Processes:
    """World size and rank of this process, and the collectives of a run. With one process they send nothing."""

    world_size: int = 1
    rank: int = 0

    @property
    def is_main(self) -> bool:
        """Return True on rank 0, which prints and writes files."""
        return self.rank == 0

    def shard_range(self, size: int) -> range:
        """Return this rank's contiguous part of `size` indices.

        >>> [list(Processes(2, rank).shard_range(5)) for rank in (0, 1)]
        [[0, 1], [2, 3, 4]]
        """
        return range(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)

    def gather(self, values: list) -> list:
        """Return the lists of all ranks, concatenated in rank order."""
        if self.world_size == 1:
            return values
        with peer_failures_explained():
            return gather_object(values)

    def sum(self, value: float) -> float:
        """Return the sum over all ranks, equal to the bit on each."""
        return math.fsum(self.gather([value]))

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.gather([])

    def check_same(self, what: str, value: Any) -> None:
        """Raise ValueError on every rank if the ranks have different values."""
        if len(set(self.gather([value]))) > 1:
            raise ValueError(
                f"the processes of this run have different {what}: all must have the same. Is it shuffled or sampled "
                "without a seed? Set one."
            )

    @torch.no_grad()
    def broadcast_weights(self, model: nn.Module) -> None:
        """Broadcast rank 0's weights and buffers into the model, so that all replicas start equal."""
        if self.world_size > 1:
            with peer_failures_explained():
                for value in [*model.parameters(), *model.buffers()]:
                    buffer = value.detach().contiguous()
                    distributed.broadcast(buffer.view(-1).view(torch.uint8), 0)  # as bytes: gloo supports few dtypes
                    value.copy_(buffer)

    @torch.no_grad()
    def all_reduce_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its sum over all ranks; each rank has already divided by the totals of all ranks.

        DTensors are left out: FSDP reduces their gradients.
        """
        if self.world_size == 1:
            return
        weights = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        # A weight that only other ranks used, such as an expert's, has no gradient here, but every rank must take part
        # in each all-reduce. A weight that no rank used keeps grad None.
        used = zip(weights, *self.gather([[p.grad is not None for p in weights]]), strict=True)
        pending = []
        with peer_failures_explained():
            for parameter in [p for p, *by_rank in used if any(by_rank)]:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                pending.append(distributed.all_reduce(parameter.grad, async_op=True))
            for reduction in pending:
                reduction.wait()


@contextmanager
def peer_failures_explained() -> Iterator[None]:
    """Turn an error of gloo or NCCL into a ConnectionError that says that another process has failed."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but of this process
        raise
    except RuntimeError as error:  # gloo and NCCL raise it for a closed connection or a timeout
        raise ConnectionError(
            "another process of this run has ended or does not answer; see its output for the reason. Continue from "
            "the last checkpoint with --resume (resume=True), with any number of processes."
        ) from error
