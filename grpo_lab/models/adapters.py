"""LoRA: train small matrices beside frozen weights, and use the same model without them as the reference.

`peft` does the work. What is said here is how its models differ from plain ones in a run: the reference is
the model with its adapter off, a checkpoint holds the adapter alone, and the final model is merged.
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
    """Is this a `peft.PeftModel`?"""
    return hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")


def add_lora(model: nn.Module, *, rank: int, alpha: float, seed: int) -> nn.Module:
    """Freeze the model and put a LoRA adapter beside each of its linear layers but the last.

        W x  ->  W x + (alpha / rank) B A x,    A: [rank, in] random, B: [out, rank] zero

    so that the adapted model starts as the model that it was.

    Args:
        model: a causal LM; its layers are replaced in place.
        rank: of the update of each matrix.
        alpha: the update's scale is alpha / rank.
        seed: of A; no global random state is changed.
    Returns: a `peft.PeftModel` around it.
    Raises: ValueError if peft is not installed or refuses to work, or the model carries an adapter already.
    Source: LoRA (arXiv 2106.09685), section 4.1.
    """
    if is_adapted(model):
        raise ValueError("the model carries an adapter already. Leave lora_rank out to train that one.")
    with _peft() as peft, torch.random.fork_rng(), warnings.catch_warnings():
        # peft calls transformers by an older name, and tells how GPT-2 stores its matrices, which it handles
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)


def check_adapter(model: nn.Module) -> None:
    """Raises ValueError, with the cure, for an adapter that could be trained but neither saved nor merged."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            "tokens in front of the prompt cannot be merged into a model. Use an adapter of its layers: LoRA."
        )
    if (active := model.active_adapters) != ["default"]:
        raise ValueError(
            f'the adapter to train must be called "default" and be the only active one, got {", ".join(active)}. '
            'Load it with adapter_name="default", and merge_and_unload() what lies under it.'
        )


def merged(model: nn.Module) -> nn.Module:
    """A plain copy of the model, in main memory, with its adapter added into the weights; to be saved, not trained.

    The model itself stays where it is, as it is. On a CPU the copy shares all weights that have no adapter.
    """
    # safe_merge puts a new matrix in the place of each that has an adapter: the one that is shared is not written to
    return rebuilt(model, lambda tensor: tensor.cpu()).merge_and_unload(safe_merge=True)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put an adapter's saved weights into the model. Raises ValueError if they do not fit or peft refuses to work."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError("it holds no adapter; a final model, being merged, cannot be trained on as the same run")
    with _peft() as peft:
        saved = peft.load_peft_weights(str(folder), device="cpu")
        wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        wanted = {name: weight.shape for name, weight in wanted.items()}
        if wrong := sorted(wanted.items() ^ {name: weight.shape for name, weight in saved.items()}.items()):
            raise ValueError(f"the adapter is another one: {wrong[0][0]} differs")
        peft.set_peft_model_state_dict(model, saved)


@contextmanager
def _peft() -> Iterator[ModuleType]:
    """Import peft, and turn an ImportError, which peft raises late for what it finds too old, into its cure."""
    try:
        import peft

        yield peft
    except ImportError as error:
        if error.name == "peft":
            cure = "LoRA needs the package peft: pip install peft."
        elif "torchao" in str(error):  # peft needs none, but refuses an old one that happens to be installed
            cure = f"peft refuses the installed torchao ({error}): pip uninstall -y torchao, or pip install -U torchao."
        else:
            cure = f"peft cannot be used ({error}): pip install -U peft."
        raise ValueError(cure) from error
