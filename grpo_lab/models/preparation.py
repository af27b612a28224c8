"""Prepare a model for training: precision of its weights, dropout, activation checkpointing."""

import torch
from torch import nn

from grpo_lab.hardware.system import return_freed_memory


def trainable_in_float32(model: nn.Module) -> None:
    """Cast trainable half-precision weights to float32: at usual learning rates their updates would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def match_precision(model: nn.Module, other: nn.Module) -> None:
    """Cast the model's weights to the dtypes of the weights of the same name in `other`; buffers stay as they are."""
    wanted = {name: parameter.dtype for name, parameter in other.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wanted.get(name, parameter.dtype))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: in nn.Dropout modules and in the attributes that attention layers use.

    eval() would also turn off dropout, but gradient checkpointing with it.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def enable_checkpointing(model: nn.Module) -> None:
    """Turn on gradient checkpointing: keep each layer's input and recompute the rest in backward (in train mode)."""
    if next(model.parameters()).device.type == "cpu":
        return_freed_memory()
    # transformers renamed this method in 5.2x; older versions have only the second name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
