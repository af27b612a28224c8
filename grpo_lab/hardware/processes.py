"""Several processes, one run: each takes whole groups of every step, and every mean is over all of them.

    accelerate launch -m grpo_lab.train_grpo ...       as many processes as there are GPUs
    torchrun --nproc-per-node 2 -m grpo_lab.train_grpo --device cpu ...

So N processes end with the weights of one, within rounding, and a run may go on with another number of them. Each
process holds the model and adds its gradient to that of the others; with `fsdp` weights, gradients and the
optimizer's state are sharded between them for the update, beside a whole copy of the weights that samples.

All start from the weights of the first, and must have the same data. What dropout and reward functions draw differs
between them, and with their number.

DDP of PyTorch would send gradients while others are still computed; it takes as many backward passes in each process,
though, and here micro-batches follow the lengths of the completions.
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
    """Which of how many this is. With one, nothing is sent."""

    world_size: int = 1
    rank: int = 0

    @property
    def is_main(self) -> bool:
        """Does this one write files?"""
        return self.rank == 0

    def shard_range(self, size: int) -> range:
        """Which of `size` things in a row are this process's.

        >>> [list(Processes(2, rank).shard_range(5)) for rank in (0, 1)]
        [[0, 1], [2, 3, 4]]
        """
        return range(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)

    def gather(self, mine: list) -> list:
        """The lists of all processes, one after the other: what was shared out stands in its order again."""
        if self.world_size == 1:
            return mine
        with peer_failures_explained():
            return gather_object(mine)

    def sum(self, mine: float) -> float:
        """The sum over all processes, the same to the bit in each."""
        return math.fsum(self.gather([mine]))

    def barrier(self) -> None:
        """Until all are here."""
        self.gather([])

    def check_same(self, what: str, mine: Any) -> None:
        """Raises ValueError in all processes if they have not the same."""
        if len(set(self.gather([mine]))) > 1:
            raise ValueError(
                f"the processes of this run have different {what}. Is it drawn or shuffled without a seed? Give one: "
                "each process must make the same."
            )

    @torch.no_grad()
    def broadcast_weights(self, model: nn.Module) -> None:
        """Give the model the weights of the first process's: from others, gradients that are added up lead nowhere."""
        if self.world_size > 1:
            with peer_failures_explained():
                for value in [*model.parameters(), *model.buffers()]:
                    sent = value.detach().contiguous()
                    distributed.broadcast(sent.view(-1).view(torch.uint8), 0)  # bytes: gloo knows few types
                    value.copy_(sent)

    @torch.no_grad()
    def all_reduce_gradients(self, model: nn.Module) -> None:
        """Each gradient becomes the sum of those of all processes: each has divided by the totals of all already."""
        if self.world_size == 1:
            return
        weights = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        # what only others have used, an expert say, has no gradient here: each must send as many as the others await
        used = zip(weights, *self.gather([[p.grad is not None for p in weights]]), strict=True)
        sent = []
        with peer_failures_explained():
            for parameter in [p for p, *by in used if any(by)]:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sent.append(distributed.all_reduce(parameter.grad, async_op=True))
            for gradient in sent:
                gradient.wait()


@contextmanager
def peer_failures_explained() -> Iterator[None]:
    """Turn an error of gloo or NCCL into a ConnectionError that says what happened to the other process."""
    try:
        yield
    except torch.OutOfMemoryError:  # is a RuntimeError too, and nobody else's fault
        raise
    except RuntimeError as error:  # gloo's and NCCL's: a connection that was closed, a process that does not answer
        raise ConnectionError(
            "another process of this run has ended, or does not answer; what it printed says why. --resume "
            "(resume=True) goes on from the last checkpoint, with as many processes as you like."
        ) from error
