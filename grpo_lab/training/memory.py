"""Memory of a training step: how many prompts to sample together, and what to lower when memory runs out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from grpo_lab.training.config import GRPOConfig


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of all weights and of the trained ones."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return {"weights": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}


def rollout_batch_size(
    model: nn.Module, config: GRPOConfig, precision: str, columns: int, *, weights: int, trained: int
) -> int:
    """Return how many prompts to sample together: the more, the less often the weights are read per token.

    Keys, values and logits get the room that the gradients take later in a step, or half that of the weights,
    whichever is more; and what four micro-batches of completions need, because a training pass keeps at least eight
    times as much of each token (one, where activations are recomputed).

    Args:
        columns: tokens of prompt and completion at most.
        weights, trained: see `weight_bytes`.
    """
    micro_batches = config.batch_size * (1 if config.gradient_checkpointing else 4)
    known = model.config.get_text_config()
    heads = getattr(known, "num_key_value_heads", None) or getattr(known, "num_attention_heads", None)
    width = getattr(known, "head_dim", None) or (heads and known.hidden_size // known.num_attention_heads)
    if not isinstance(heads, int) or not isinstance(width, int):  # a cache of unknown size
        return micro_batches
    cache = 2 * known.num_hidden_layers * heads * width * columns * (4 if precision == "fp32" else 2)
    logits = 28 * model.get_input_embeddings().weight.shape[0]  # float32, and the copies that `truncate` makes
    room = max(trained, weights // 2)
    return max(micro_batches, room // ((cache + logits) * config.num_generations_per_prompt))


OUT_OF_MEMORY = (
    "out of memory on {device}, with micro-batches of {rows} completions of up to {length} tokens (sampling takes "
    "several at a time). Lower one of: "
    "--batch-size (now {batch_size}; more --gradient-accumulation-steps keeps the step as it is), "
    "--num-generations (K, now {k}), --max-new-tokens (now {length}); or use --precision bf16 (now {precision}), "
    "--gradient-checkpointing, or a smaller model. Checkpoints and metrics so far are in {output_dir}."
)


@contextmanager
def memory_explained(device: torch.device, precision: str, config: GRPOConfig) -> Iterator[None]:
    """Turn out of memory, on any device, into a MemoryError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        said = re.search(
            "out of memory|can't allocate memory", str(error)
        )  # the words of CUDA's driver and MPS; of a CPU
        if not (said or isinstance(error, torch.OutOfMemoryError)):
            raise
        words = OUT_OF_MEMORY.format(
            device=device, rows=config.batch_size * config.num_generations_per_prompt, length=config.max_new_tokens,
            batch_size=config.batch_size, k=config.num_generations_per_prompt, precision=precision,
            output_dir=config.output_dir,
        )  # fmt: skip
        raise MemoryError(words) from error
