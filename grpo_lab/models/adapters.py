"""LoRA: train small matrices beside frozen weights.

`peft` does the work. This module handles how its models differ from plain ones in a run: the reference is
the model with its adapter disabled, a checkpoint holds only the adapter, and the final model is merged.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from grpo_lab.models.forward import rebuilt


def is_adapted(model: nn.Module) -> bool:
    """Return whether this is a `peft.PeftModel`."""
    return hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")


def add_lora(model: nn.Module, *, rank: int, alpha: float, seed: int) -> nn.Module:
    """Freeze the model and add a LoRA adapter to each of its linear layers except the last.

        W x  ->  W x + (alpha / rank) B A x,    A: [rank, in] random, B: [out, rank] zero

    Since B is zero, the outputs are the same at the start.

    Args:
        model: a causal LM; its layers are replaced in place.
        rank: rank of each matrix's update.
        alpha: the update is scaled by alpha / rank.
        seed: random seed for A; the global random state does not change.
    Returns: a `peft.PeftModel` that wraps the model.
    Raises: ValueError if peft is missing or raises an ImportError, or if the model already has an adapter.
    Source: LoRA (arXiv 2106.09685), section 4.1.
    """
    if is_adapted(model):
        raise ValueError("the model already has an adapter. Omit lora_rank to train that one.")
    with _peft() as peft, torch.random.fork_rng(), warnings.catch_warnings():
        # peft uses a deprecated name of transformers, and warns of GPT-2's transposed weights, which it handles
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)


def check_adapter(model: nn.Module) -> None:
    """Raise ValueError, with the cure, for an adapter that could be trained but not saved or merged."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            "an adapter of virtual prompt tokens cannot be merged into the model's weights. Use a LoRA adapter."
        )
    if (active := model.active_adapters) != ["default"]:
        raise ValueError(
            f'the adapter to train must be named "default" and be the only active one, got {", ".join(active)}. '
            'Load it with adapter_name="default", and merge any other adapter first with merge_and_unload().'
        )


def merged(model: nn.Module) -> nn.Module:
    """Return a plain copy of the model on the CPU with its adapter merged into the weights; save it, do not train it.

    The model itself is neither changed nor moved. On a CPU, the copy shares all weights that have no adapter.
    """
    # safe_merge makes a new matrix for each one that has an adapter, so it does not write to shared weights
    return rebuilt(model, lambda tensor: tensor.cpu()).merge_and_unload(safe_merge=True)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load an adapter's saved weights into the model. Raises ValueError if they do not fit or peft cannot be used."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError("it holds no adapter; a final model is merged, so the run cannot be resumed from it")
    with _peft() as peft:
        saved = peft.load_peft_weights(str(folder), device="cpu")
        wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        wanted = {name: weight.shape for name, weight in wanted.items()}
        if wrong := sorted(wanted.items() ^ {name: weight.shape for name, weight in saved.items()}.items()):
            raise ValueError(f"the adapter does not fit the model: {wrong[0][0]} differs")
        peft.set_peft_model_state_dict(model, saved)


@contextmanager
def _peft() -> Iterator[ModuleType]:
    """Import peft; turn its ImportErrors, some of which come only when it is used, into a ValueError with the cure."""
    try:
        import peft

        yield peft
    except ImportError as error:
        if error.name == "peft":
            cure = "LoRA needs the package peft: pip install peft."
        elif "torchao" in str(error):  # not needed for LoRA, but peft refuses an old one
            cure = f"peft refuses the installed torchao ({error}): pip uninstall -y torchao, or pip install -U torchao."
        else:
            cure = f"peft cannot be used ({error}): pip install -U peft."
        raise ValueError(cure) from error
