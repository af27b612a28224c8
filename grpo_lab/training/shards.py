"""FSDP: shard weights, gradients and the optimizer's state between processes."""

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo_lab.hardware.processes import Processes, peer_failures_explained
from grpo_lab.models.forward import built_like, completion_logits


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

    model.cpu()  # sharded from the CPU layer by layer, so that the GPU never holds two full copies
    whole = copy.deepcopy(model).requires_grad_(False).eval().to(device)
    token = torch.zeros(1, 2, dtype=torch.long, device=device)
    completion_logits(whole, token, torch.ones_like(token), 1)  # warm-up: finds and caches how body and head are called
    built_like(model, whole)
    mesh = init_device_mesh(device.type, (processes.world_size,))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.grpo_score = types.MethodType(score, model)
    register_fsdp_forward_method(model, "grpo_score")
    return whole, lambda model, *inputs, **settings: model.grpo_score(*inputs, **settings)


@torch.no_grad()
def gather_weights(model: nn.Module, whole: nn.Module) -> None:
    """Copy the weights of a sharded model into its unsharded copy."""
    with peer_failures_explained():
        for parameter, target in zip(model.parameters(), whole.parameters(), strict=True):
            target.copy_(to_full_tensor(parameter))


@torch.no_grad()
def scatter_weights(whole: nn.Module, model: nn.Module) -> None:
    """Copy the weights of an unsharded model into a sharded one."""
    for source, parameter in zip(whole.parameters(), model.parameters(), strict=True):
        parameter.copy_(_like(source, parameter))


def gather_state(optimizer, processes: Processes) -> dict:
    """Return the unsharded state dict of the optimizer on rank 0; other ranks, which write nothing, get no tensors.

    Shards are gathered one tensor at a time and moved to the CPU, so that no device holds the full state.
    """

    def whole(value):
        value = to_full_tensor(value).cpu() if isinstance(value, DTensor) else value
        return value if processes.is_main else None

    state = optimizer.state_dict()
    with peer_failures_explained():
        values = {i: {name: whole(v) for name, v in some.items()} for i, some in state["state"].items()}
    return {**state, "state": values}


def scatter_state(state: dict, optimizer) -> dict:
    """Shard a full state dict like the optimizer's weights, one tensor at a time."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        i: {name: _like(v, parameters[i]) if v.shape == parameters[i].shape else v for name, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": shards}


def to_full_tensor(value):
    """Return a sharded tensor as a full one; anything else unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def pad_micro_batches(parts: Sequence, processes: Processes) -> list[tuple[Any, float]]:
    """Return the micro-batches with a factor for their loss, equally many on every rank, as FSDP's collectives need.

    FSDP averages gradients over ranks where we want a sum, hence the factor world_size. A rank with fewer micro-batches
    repeats its first with factor 0. `no_gradient` is cleared: a batch saved by one process may contain it.
    """
    for part in parts:
        part.no_gradient = False
    most = max(processes.gather([len(parts)]))
    return [(part, float(processes.world_size)) for part in parts] + [(parts[0], 0.0)] * (most - len(parts))
