"""Fingerprints of data and weights, and the random state: what makes a resumed run the same run."""

import copyreg
import json
import random
import sys
import zlib
from collections.abc import Iterable, Set
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from grpo_lab.models.adapters import is_adapted
from grpo_lab.training.config import GRPOConfig

# Settings that may change on resume, because they do not change what is computed.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "save_total_limit", "eval_steps",
    "success_reward", "use_wandb", "wandb_project", "wandb_run_name", "report_to", "device", "max_skipped_steps",
    "gradient_checkpointing", "reward_timeout", "fsdp", "vllm_server", "vllm_gpu_memory",
}  # fmt: skip


def fingerprint(rows: Iterable[Any]) -> str:
    """Return a short hash of all rows in their order, to detect a changed dataset; the same in every process.

    Raises: ValueError for a value without a stable form, such as a lambda, an open file or a list that holds itself.
    """
    value = 0
    for i, row in enumerate(rows):
        try:
            text = json.dumps(_stable(row), sort_keys=True)
        except Exception as error:  # an object's own __reduce__ may raise anything
            raise ValueError(
                f"row {i} of the training data holds a value that no other process could recognize, so the run could "
                f"not be resumed: {str(error)[:120]}. Use texts, numbers, lists, dicts, sets or objects made of them."
            ) from None
        value = zlib.crc32(text.encode(), value)
    return f"{value:08x}"


def _stable(value: Any) -> Any:
    """Return JSON values that stand for a Python value: no addresses, and no order of a set."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_stable(element) for element in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _stable(element) for key, element in value.items()}
        return {"dict": _sorted([_stable(key), _stable(element)] for key, element in value.items())}
    if isinstance(value, Set):
        return {type(value).__name__: _sorted(_stable(element) for element in value)}
    if isinstance(value, bytes | bytearray | Decimal | date | time | timedelta):
        return repr(value)
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return ["tensor", str(value.dtype), list(value.shape), zlib.crc32(content)]
    if isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        return ["array", value.dtype.str, list(value.shape), zlib.crc32(value.tobytes())]
    if isinstance(value, numpy.ndarray | numpy.generic):
        return [str(value.dtype), _stable(value.tolist())]
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _name(value)
    return _parts(value)


def _sorted(elements: Iterable[Any]) -> list:
    return sorted(elements, key=lambda element: json.dumps(element, sort_keys=True))


def _name(value: Any) -> str:
    """Return the name by which a class or function can be imported."""
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise ValueError(f"{value.__qualname__} cannot be imported by its name")
    return f"{value.__module__}.{value.__qualname__}"


def _parts(value: Any) -> list:
    """Return the parts from which pickle would build an object again."""
    reduce = copyreg.dispatch_table.get(type(value))
    parts = reduce(value) if reduce else value.__reduce_ex__(2)
    if isinstance(parts, str):  # the name of a global
        return [type(value).__name__, parts]
    made_by, arguments, state, elements, items = (*parts, *[None] * 3)[:5]
    return [
        _name(made_by),
        _name(type(value)),
        *map(_stable, (arguments, state, list(elements or ()), list(items or ()))),
    ]


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
