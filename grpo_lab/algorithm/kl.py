"""KL divergence of the policy from the reference: exact, and estimated from sampled tokens.

For tokens x drawn from the policy pi, with d = log pi(x) - log ref(x):

    estimator   value        expected value    expected gradient (through pi's log-probabilities)
    k1          d            KL(pi || ref)     0: useless as a loss term
    k2          d^2 / 2      only nearly KL    that of KL(pi || ref)
    k3          e^-d - 1 + d KL(pi || ref)     that of KL(ref || pi)

DeepSeekMath puts k3 in the loss, and so does this package by default. Source of the three: Schulman,
"Approximating KL Divergence" (2020), joschu.net/blog/kl-approx.html.
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: Estimator = "k3") -> Tensor:
    """Return an estimate of KL(pi || ref) from each sampled token.

        k1 = log pi - log ref
        k2 = (log pi - log ref)^2 / 2
        k3 = exp(log ref - log pi) - (log ref - log pi) - 1        never negative

    Args:
        logprobs: [B, T] log pi of the sampled tokens, in nats; the gradient flows through these.
        ref_logprobs: [B, T] log ref of the same tokens; detached here.
        mask: [B, T] True where a token was sampled, the end token included.
        estimator: see the table at the top of this module.
    Returns: [B, T] in nats, zero where the mask is False.
    Raises: ValueError for an unknown estimator or different shapes.
    Source: DeepSeekMath (arXiv 2402.03300), equation 4, for k3.

    >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[True]]))  # e^-1 - (-1) - 1
    tensor([[0.3679]])
    """
    if not logprobs.shape == ref_logprobs.shape == mask.shape:
        raise ValueError(
            "logprobs, ref_logprobs and mask must share one shape [B, T], "
            f"got {list(logprobs.shape)}, {list(ref_logprobs.shape)} and {list(mask.shape)}."
        )
    # mask first: at padding, exp of an infinite ratio would give a NaN gradient even if its value is masked later
    log_ratio = (ref_logprobs.detach() - logprobs).where(mask, 0.0)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.expm1() - log_ratio  # expm1 keeps the digits that exp(x) - 1 loses near 0
    raise ValueError(f'estimator must be "k1", "k2" or "k3", got {estimator!r}')


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Return the exact KL divergence between two next-token distributions.

        KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v))

    Args:
        logits, ref_logits: [..., V].
    Returns: [...] in nats; infinite where pi allows what ref forbids. Differentiable in both.

    >>> exact_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor(0.)
    """
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    difference = (logp - logq).where(logp > -torch.inf, 0.0)  # 0 * log 0 counts as 0
    return (logp.exp() * difference).sum(-1)
