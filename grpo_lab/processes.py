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

import copy
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo_lab.forward import built_like, completion_logits


@dataclass(frozen=True)
class Processes:
    """Which of how many this is. With one, nothing is sent."""

    count: int = 1
    index: int = 0

    @property
    def is_first(self) -> bool:
        """Does this one write files?"""
        return self.index == 0

    def share(self, size: int) -> range:
        """Which of `size` things in a row are this process's.

        >>> [list(Processes(2, index).share(5)) for index in (0, 1)]
        [[0, 1], [2, 3, 4]]
        """
        return range(self.index * size // self.count, (self.index + 1) * size // self.count)

    def together(self, mine: list) -> list:
        """The lists of all processes, one after the other: what was shared out stands in its order again."""
        if self.count == 1:
            return mine
        with _everyone_there():
            return gather_object(mine)

    def total(self, mine: float) -> float:
        """The sum over all processes, the same to the bit in each."""
        return math.fsum(self.together([mine]))

    def wait(self) -> None:
        """Until all are here."""
        self.together([])

    def agree(self, what: str, mine: Any) -> None:
        """Raises ValueError in all processes if they have not the same."""
        if len(set(self.together([mine]))) > 1:
            raise ValueError(
                f"the processes of this run have different {what}. Is it drawn or shuffled without a seed? Give one: "
                "each process must make the same."
            )

    @torch.no_grad()
    def take_weights(self, model: nn.Module) -> None:
        """Give the model the weights of the first process's: from others, gradients that are added up lead nowhere."""
        if self.count > 1:
            with _everyone_there():
                for value in [*model.parameters(), *model.buffers()]:
                    sent = value.detach().contiguous()
                    distributed.broadcast(sent.view(-1).view(torch.uint8), 0)  # bytes: gloo knows few types
                    value.copy_(sent)

    @torch.no_grad()
    def add_gradients(self, model: nn.Module) -> None:
        """Each gradient becomes the sum of those of all processes: each has divided by the totals of all already."""
        if self.count == 1:
            return
        weights = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        # what only others have used, an expert say, has no gradient here: each must send as many as the others await
        used = zip(weights, *self.together([[p.grad is not None for p in weights]]), strict=True)
        sent = []
        with _everyone_there():
            for parameter in [p for p, *by in used if any(by)]:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sent.append(distributed.all_reduce(parameter.grad, async_op=True))
            for gradient in sent:
                gradient.wait()


@contextmanager
def _everyone_there() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # is a RuntimeError too, and nobody else's fault
        raise
    except RuntimeError as error:  # gloo's and NCCL's: a connection that was closed, a process that does not answer
        raise ConnectionError(
            "another process of this run has ended, or does not answer; what it printed says why. --resume "
            "(resume=True) goes on from the last checkpoint, with as many processes as you like."
        ) from error


# --- weights, gradients and the optimizer's state in shards -----------------------------------------------


def shard(model: nn.Module, score: Callable, processes: Processes, device: torch.device) -> tuple[nn.Module, Callable]:
    """Shard the model by FSDP (`fully_shard`), layer by layer; while one is computed, its weights are whole.

    Args:
        model: sharded in place.
        score: f(model, ...) that the update differentiates.
    Returns: a whole copy for everything that needs no gradient, and `score` as a forward pass of the sharded model.
    Source: Zhao et al., PyTorch FSDP (arXiv 2304.11277); Rajbhandari et al., ZeRO (1910.02054), stage 3.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model.cpu()  # from where it goes layer by layer: there are never two whole ones on a GPU
    whole = copy.deepcopy(model).requires_grad_(False).eval().to(device)
    token = torch.zeros(1, 2, dtype=torch.long, device=device)
    completion_logits(whole, token, torch.ones_like(token), 1)  # asks how it is built, by passes that are of no update
    built_like(model, whole)
    mesh = init_device_mesh(device.type, (processes.count,))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.grpo_score = types.MethodType(score, model)
    register_fsdp_forward_method(model, "grpo_score")
    return whole, lambda model, *inputs, **settings: model.grpo_score(*inputs, **settings)


@torch.no_grad()
def gather_weights(model: nn.Module, whole: nn.Module) -> None:
    """Bring the whole copy of a sharded model up to date."""
    with _everyone_there():
        for parameter, target in zip(model.parameters(), whole.parameters(), strict=True):
            target.copy_(full(parameter))


@torch.no_grad()
def scatter_weights(whole: nn.Module, model: nn.Module) -> None:
    """Give a sharded model the weights of a whole one."""
    for source, parameter in zip(whole.parameters(), model.parameters(), strict=True):
        parameter.copy_(_like(source, parameter))


def gather_state(optimizer, processes: Processes) -> dict:
    """The optimizer's state dict as that of one process, in the first; the others, which do not write, get no tensors.

    Of shards one at a time is made whole and goes to main memory: a device that trains need not hold all.
    """

    def whole(value):
        value = full(value).cpu() if isinstance(value, DTensor) else value
        return value if processes.is_first else None

    state = optimizer.state_dict()
    with _everyone_there():
        values = {i: {name: whole(v) for name, v in some.items()} for i, some in state["state"].items()}
    return {**state, "state": values}


def scatter_state(state: dict, optimizer) -> dict:
    """A whole state dict sharded as the optimizer's weights are, one tensor at a time."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        i: {name: _like(v, parameters[i]) if v.shape == parameters[i].shape else v for name, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": shards}


def full(value):
    """A sharded tensor made whole; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def as_many(parts: Sequence, processes: Processes) -> list[tuple[Any, float]]:
    """Micro-batches, as many in every process, each with a factor for its loss: a pass of shards is one of all at once.

    FSDP takes the mean over processes, of what is to be a sum, hence their number as the factor; where a process has
    fewer micro-batches, its first comes again, with factor 0. None is idle, as a rollout may be that one process saved.
    """
    for part in parts:
        part.idle = False
    most = max(processes.together([len(parts)]))
    return [(part, float(processes.count)) for part in parts] + [(parts[0], 0.0)] * (most - len(parts))
