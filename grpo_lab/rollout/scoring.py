"""Log-probabilities of completions under a model: the policy, the old policy or the reference."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_lab.algorithm.logprobs import token_entropies, token_logprobs
from grpo_lab.models.forward import Head, completion_states, first_of_each

CHUNK_ELEMENTS = 2**24  # logits computed at a time: 64 MiB in float32


class Scores(NamedTuple):
    """Log-probabilities and entropies of completions, from one forward pass."""

    logprobs: Tensor
    """[B, T] in nats, with gradient if gradients are enabled."""
    entropies: Tensor | None
    """[B, T] in nats, without gradient; None if they were not requested."""


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
    """Return the log-probability of each completion token under the model, given all tokens before it.

    Args:
        model: a causal LM as in Transformers: called with input_ids and attention_mask, it returns `.logits`.
        input_ids: [B, S] rows of [left-padded prompt | right-padded completion].
        attention_mask: [B, S] 1 where a token is real.
        num_tokens: T, the number of completion columns at the end; at least one column must precede them.
        dedup: compute each distinct prompt and each distinct row only once, if the model allows it. Set it to False
            while dropout is on, which must differ between rows.
        temperature, kept: the ones used for sampling, see `token_logprobs`.
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
    """Return what `completion_logprobs` does and, from the same logits, the entropy at each position."""
    return _scores(model, input_ids, attention_mask, num_tokens, dedup, temperature, kept, with_entropies=True)


def _scores(model, input_ids, attention_mask, num_tokens, dedup, temperature, kept, *, with_entropies: bool) -> Scores:
    # A model that has settled on a few answers repeats them among its K completions: each distinct row is scored once.
    number, first = first_of_each(input_ids, attention_mask, *([] if kept is None else [kept]))
    if not dedup or len(first) == len(input_ids):
        number = first = torch.arange(len(input_ids), device=input_ids.device)
    input_ids, attention_mask, kept = input_ids[first], attention_mask[first], None if kept is None else kept[first]
    states, head = completion_states(model, input_ids, attention_mask, num_tokens, dedup=dedup)

    # Only real positions go through the head, in chunks that are recomputed in backward: with a large vocabulary, all
    # logits at once, with their float32 copy and their gradient, would run out of memory.
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
    if entropies == []:  # requested, and not a recomputation in backward, which finds them there
        with torch.no_grad():
            entropies.append(token_entropies(logits, temperature=temperature))
    return token_logprobs(logits, tokens, temperature=temperature, kept=kept)


def _spread(parts: list[Tensor], real: Tensor) -> Tensor:
    values = torch.cat(parts)
    return values.new_zeros(real.shape).masked_scatter(real, values)
