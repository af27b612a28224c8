"""Log-probabilities of completions under a model. Policy, old policy and reference all go through here."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_lab.logprobs import token_entropies, token_logprobs

CHUNK_ELEMENTS = 2**24  # logits turned to float32 at a time: 64 MiB


class Scores(NamedTuple):
    """What one forward pass says about completions."""

    logprobs: Tensor
    """[B, T] in nats, with gradient where the model has it."""
    entropies: Tensor
    """[B, T] in nats, without gradient."""


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> Tensor:
    """How likely is each completion token under the model, given all that stands before it?

    Args:
        model: a causal LM of Hugging Face's kind: called with input_ids and attention_mask, returns `.logits`.
        input_ids: [B, S] rows of [left-padded prompt | right-padded completion].
        attention_mask: [B, S] 1 where a token is real.
        num_tokens: T, how many of the last columns are the completion; at least one column stands before.
        temperature, kept: as the tokens were sampled, see `token_logprobs`.
    Returns: [B, T] in nats; what stands at padding is finite and means nothing.
    """
    logits = completion_logits(model, input_ids, attention_mask, num_tokens)
    return _in_chunks(token_logprobs, logits, input_ids[:, -num_tokens:], kept, temperature)


def completion_scores(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> Scores:
    """`completion_logprobs`, and from the same logits how undecided the model was at each position."""
    logits = completion_logits(model, input_ids, attention_mask, num_tokens)
    logprobs = _in_chunks(token_logprobs, logits, input_ids[:, -num_tokens:], kept, temperature)
    with torch.no_grad():
        chunks = logits.detach().flatten(0, 1).split(_positions_at_a_time(logits))
        entropies = torch.cat([token_entropies(chunk, temperature=temperature) for chunk in chunks])
    return Scores(logprobs, entropies.view_as(logprobs))


def completion_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
    """[B, T, V] logits, position t predicting completion token t. The shift by one happens here and nowhere else."""
    if not 0 < num_tokens < input_ids.shape[1]:
        raise ValueError(
            f"num_tokens must leave at least one column of prompt: got {num_tokens} of {input_ids.shape[1]} columns."
        )
    extra = {"logits_to_keep": num_tokens + 1} if accepts(model, "logits_to_keep") else {}
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        **position_ids(model, attention_mask),
        **extra,
    )
    # the token at column s was predicted from column s - 1; what the last column predicts was never sampled
    return output.logits[:, -num_tokens - 1 : -1]


def position_ids(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Positions that start at the first real token, as a keyword for the model, if it takes one.

    Without them a left-padded prompt would start at the position of its padding, and a model with
    learned positions (GPT-2) would read another prompt.
    """
    if not accepts(model, "position_ids"):
        return {}  # the model derives them from the mask, or has none (BLOOM)
    return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}


def accepts(model: nn.Module, argument: str) -> bool:
    """Does the model underneath its wrappers (DDP, PEFT) take this keyword?"""
    model = getattr(model, "module", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return argument in inspect.signature(model.forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while: dropout is neither for sampling nor for judging."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _positions_at_a_time(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits.shape[-1])


def _in_chunks(function, logits: Tensor, tokens: Tensor, kept: Tensor | None, temperature: float) -> Tensor:
    # A float32 copy of all logits, and another in backward, is what runs out of memory with a large
    # vocabulary: so some positions at a time, recomputed in backward.
    size = _positions_at_a_time(logits)
    if size >= tokens.numel():
        return function(logits, tokens, temperature=temperature, kept=kept)
    kept_chunks = kept.flatten(0, 1).split(size) if kept is not None else [None] * -(-tokens.numel() // size)
    chunks = zip(logits.flatten(0, 1).split(size), tokens.flatten().split(size), kept_chunks, strict=True)
    results = [
        checkpoint(function, part, ids, temperature=temperature, kept=allowed, use_reentrant=False)
        for part, ids, allowed in chunks
    ]
    return torch.cat(results).view_as(tokens)
