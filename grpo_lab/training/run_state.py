"""Fingerprints of data and weights, and the random state: what makes a resumed run the same run."""

import json
import random
import zlib
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import nn

from grpo_lab.models.adapters import is_adapted
from grpo_lab.training.config import GRPOConfig

# Settings that may change on resume, because they do not change what is computed.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "save_total_limit", "eval_steps",
    "success_reward", "use_wandb", "wandb_project", "wandb_run_name", "report_to", "device", "max_skipped_steps",
    "gradient_checkpointing", "reward_timeout", "fsdp", "vllm_server", "vllm_gpu_memory",
}  # fmt: skip


def fingerprint(rows: Iterable[Any]) -> str:
    """Return a short hash of all rows in their order, to detect a changed dataset."""
    value = 0
    for row in rows:
        value = zlib.crc32(json.dumps(row, sort_keys=True, default=repr).encode(), value)
    return f"{value:08x}"


def weights_fingerprint(model: nn.Module, *, frozen: bool = False) -> str:
    """Return a short hash of a model's weights, or of the frozen ones alone, independent of their precision."""
    value = 0
    for parameter in model.parameters():
        if frozen and parameter.requires_grad:
            continue
        value = zlib.crc32(parameter.detach().float().cpu().contiguous().numpy(), value)
    return f"{value:08x}"


def fingerprints(dataset, model: nn.Module, ref_model: nn.Module | None) -> dict[str, str]:
    """Return short hashes of what decides a run and is in no checkpoint: data, reference, weights under an adapter."""
    found = {
        "training data": fingerprint(dataset[i] for i in range(len(dataset))),
        "reference model": weights_fingerprint(ref_model) if ref_model else "none",
    }
    if is_adapted(model):
        found["model under the adapter"] = weights_fingerprint(model, frozen=True)
    return found


def check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError that lists the differences if a checkpoint belongs to another run.

    Args:
        before, now: all settings, and fingerprints of what else decides the run. A setting that `before` lacks, from an
            earlier version, had the default's effect.
    """
    before = GRPOConfig().to_dict() | before
    names = sorted((before.keys() | now.keys()) - FREE_TO_CHANGE)
    changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"the checkpoint was made with other settings, so the run would not go on as it was: {'; '.join(changed)}. "
            "Resume with the old ones (and a model and reference loaded anew), or start a new run from the saved "
            "weights: --model-name CHECKPOINT."
        )


def random_state() -> dict[str, Any]:
    """Return the state of all global random number generators, as tensors and plain values."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype("int64")), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state from `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
