"""Log-probabilities of completions under a model. Policy, old policy and reference all go through here."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_lab.algorithm.logprobs import token_entropies, token_logprobs
from grpo_lab.models.forward import Head, completion_states, first_of_each

CHUNK_ELEMENTS = 2**24  # logits that exist at a time: 64 MiB in float32


class Scores(NamedTuple):
    """What one forward pass says about completions."""

    logprobs: Tensor
    """[B, T] in nats, with gradient where the model has it."""
    entropies: Tensor | None
    """[B, T] in nats, without gradient; None if they were not wanted."""


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_tokens: int,
    *,
    dedup: bool = True,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> Tensor:
    """How likely is each completion token under the model, given all that stands before it?

    Args:
        model: a causal LM of Hugging Face's kind: called with input_ids and attention_mask, returns `.logits`.
        input_ids: [B, S] rows of [left-padded prompt | right-padded completion].
        attention_mask: [B, S] 1 where a token is real.
        num_tokens: T, how many of the last columns are the completion; at least one column stands before.
        dedup: read a prompt once for all rows that begin with it, and rows that are the same once, where the model
            can do that. Not where dropout is at work, which is to differ between rows.
        temperature, kept: as the tokens were sampled, see `token_logprobs`.
    Returns: [B, T] in nats; 0 at padding.
    Raises: ValueError if there is no prompt.
    """
    return _scores(
        model, input_ids, attention_mask, num_tokens, dedup, temperature, kept, with_entropies=False
    ).logprobs


def completion_scores(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_tokens: int,
    *,
    dedup: bool = True,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> Scores:
    """`completion_logprobs`, and from the same logits how undecided the model was at each position."""
    return _scores(model, input_ids, attention_mask, num_tokens, dedup, temperature, kept, with_entropies=True)


def _scores(model, input_ids, attention_mask, num_tokens, dedup, temperature, kept, *, with_entropies: bool) -> Scores:
    # A model that has found its few answers gives many of the K completions twice: each is scored once.
    number, first = first_of_each(input_ids, attention_mask, *([] if kept is None else [kept]))
    if not dedup or len(first) == len(input_ids):
        number = first = torch.arange(len(input_ids), device=input_ids.device)
    input_ids, attention_mask, kept = input_ids[first], attention_mask[first], None if kept is None else kept[first]
    states, head = completion_states(model, input_ids, attention_mask, num_tokens, dedup=dedup)

    # Only real positions reach the head, some at a time, recomputed in backward: all logits, their copy in float32
    # and another in backward are what runs out of memory with a large vocabulary.
    real = attention_mask[:, -num_tokens:].bool()
    states, tokens, kept = states[real], input_ids[:, -num_tokens:][real], None if kept is None else kept[real]
    size = max(1, CHUNK_ELEMENTS // getattr(head, "out_features", states.shape[-1]))
    chunks = range(0, len(tokens), size)
    logprobs, entropies = [], []
    for start in chunks:
        some = slice(start, start + size)
        found: list[Tensor] | None = [] if with_entropies else None
        inputs = (head, states[some], tokens[some], None if kept is None else kept[some], temperature, found)
        logprobs.append(checkpoint(_score, *inputs, use_reentrant=False) if len(chunks) > 1 else _score(*inputs))
        entropies += found or []
    return Scores(_spread(logprobs, real)[number], _spread(entropies, real)[number] if with_entropies else None)


def _score(head: Head, states: Tensor, tokens: Tensor, kept: Tensor | None, temperature: float, entropies) -> Tensor:
    logits = head(states)
    if entropies == []:  # wanted, and not there yet: when recomputed they are
        with torch.no_grad():
            entropies.append(token_entropies(logits, temperature=temperature))
    return token_logprobs(logits, tokens, temperature=temperature, kept=kept)


def _spread(parts: list[Tensor], real: Tensor) -> Tensor:
    values = torch.cat(parts)
    return values.new_zeros(real.shape).masked_scatter(real, values)
