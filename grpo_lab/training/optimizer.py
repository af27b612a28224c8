"""AdamW with its state in float32 or in 8 bits."""

import torch
from torch import nn
from torch.optim import Optimizer

from grpo_lab.training.config import GRPOConfig


def make_optimizer(model: nn.Module, config: GRPOConfig, device: torch.device) -> Optimizer:
    """Return AdamW over the trained weights, with its state in float32 or in 8 bits (`config.optimizer`).

    The weights are float32 either way. In 8 bits (Dettmers et al., arXiv 2110.02861) each block of 256 numbers has a
    scale of its own, so that 8 bytes per weight become 2 and a bit; of a tensor with fewer than 4096 weights they
    stay in float32. Weights whose gradients are tiny beside others of their block go another way than AdamW's.

    Raises: ValueError where all weights are frozen, bitsandbytes is not installed, or cannot take such a step on this
        device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "all weights of the model are frozen: there is nothing to train. An adapter that was saved? "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, **settings, fused=device.type in ("cpu", "cuda"))
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer adamw_8bit needs bitsandbytes: pip install 'bitsandbytes>=0.50'.") from error
    one = nn.Parameter(torch.zeros(4096, device=device))  # smaller tensors stay in float32
    one.grad = torch.ones_like(one)
    try:  # its list of devices contains some without a kernel
        AdamW8bit([one], lr=1.0).step()
    except Exception as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ValueError(
            f"optimizer adamw_8bit does not run on {device.type} with this bitsandbytes ({words}). "
            "Use a newer one (pip install -U bitsandbytes), or --optimizer adamw."
        ) from error
    return AdamW8bit(trained, **settings)
