"""Log-probabilities of the chosen tokens, computed from logits.

Temperature and truncation (top-k, top-p) are applied here and nowhere else. Tokens drawn from a truncated
distribution must also be scored under it, or the importance ratio is wrong before the first update. So the
sampler stores the ids that `truncate` returns, and every scorer passes them on as `kept`.
"""

import torch
from torch import Tensor


def truncate(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor | None:
    """Return the ids of the tokens that may be drawn.

    These are the `top_k` most likely tokens and, among them, the most likely ones until their
    renormalised probability reaches `top_p`. The most likely token is always kept.

    Args:
        logits: [..., V] unnormalised log-probabilities.
        temperature: divides the logits before the top-p mass is measured.
        top_k: the most tokens to keep; 0 keeps all.
        top_p: the least probability to keep; 1.0 keeps all.
    Returns: [..., k] the ids kept, most likely first, padded with -1; None if no token was cut.
    Source: top-p is "nucleus sampling" (Holtzman et al., arXiv 1904.09751); the order of the two
        cuts is that of Hugging Face's `generate`.

    >>> truncate(torch.tensor([[2.0, 0.0, 3.0, 1.0]]), top_k=3, top_p=0.8)
    tensor([[2, 0]])
    """
    vocab = logits.shape[-1]
    k = top_k if 0 < top_k < vocab else vocab
    if k == vocab and top_p >= 1.0:
        return None
    values, ids = logits.float().topk(k)
    if top_p < 1.0:
        probs = (values / temperature).softmax(-1)
        before = probs.cumsum(-1) - probs  # probability of all more likely tokens: 0 for the first
        inside = before < top_p
        inside[..., 0] = True  # top_p = 0 means greedy
        ids = ids.masked_fill(~inside, -1)[..., : int(inside.sum(-1).max())]
    return ids


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """Return the log-probability of each chosen token, in nats.

        log p(x) = z[x] / temperature - logsumexp over the kept v of z[v] / temperature

    Args:
        logits: [B, T, V] position t predicts tokens[:, t] (the shift by one is already done).
        tokens: [B, T] the chosen ids; each must be among the kept ones.
        temperature: the one used for sampling.
        kept: [B, T, k] the ids that the sampler could choose from, -1 for padding; None means all V.
    Returns: [B, T] float32 (float64 if the logits are), differentiable in `logits`.
    Raises: ValueError if the shapes do not fit.

    >>> token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    >>> token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]]), kept=torch.tensor([[[0, 2, -1]]])).exp()
    tensor([[0.5000]])
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits must be [B, T, V] for tokens [B, T], got {list(logits.shape)} and {list(tokens.shape)}. "
            "Logits of the whole sequence? Drop the last position and the prompt: logits[:, -T-1:-1]."
        )
    chosen = _scaled(logits.gather(-1, tokens[..., None]), temperature).squeeze(-1)
    if kept is None:
        return chosen - _scaled(logits, temperature).logsumexp(-1)
    candidates = _scaled(logits.gather(-1, kept.clamp(min=0)), temperature)
    return chosen - candidates.masked_fill(kept < 0, -torch.inf).logsumexp(-1)


def token_entropies(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the entropy of the next-token distribution at each position, in nats.

        H = - sum_v p(v) log p(v),   p = softmax(z / temperature)

    0 means certain, log(V) means uniform. This is the entropy of the whole distribution, before
    truncation. It is not -log p of the sampled token, which equals it only on average.

    Args:
        logits: [B, T, V].
    Returns: [B, T] float32 (float64 if the logits are).

    >>> token_entropies(torch.zeros(1, 1, 4))  # log 4
    tensor([[1.3863]])
    """
    return torch.special.entr(_scaled(logits, temperature).softmax(-1)).sum(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    # half precision has two to three digits: too few for differences of log-probabilities
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature
