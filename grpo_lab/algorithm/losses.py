"""The GRPO loss: it makes completions that beat their group more likely, and others less likely.

    J = aggregate over tokens of [ min(c A, clip(c, 1 - eps, 1 + eps) A) - beta KL(pi || ref) ]
    c = pi(token) / pi_old(token)                                     loss = -J

Differences from the DeepSeekMath paper: `old_logprobs=None` means that the policy has not changed since it
sampled (one update per rollout), so c is 1 and only its gradient matters; and every mean can be given the
size of the whole optimizer batch, so that the losses of micro-batches add up to the same loss.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_lab.algorithm.kl import Estimator, kl_estimate

Importance = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo"]
Aggregation = Literal["sequence-mean", "token-mean", "constant"]
Correction = Literal["sequence", "token"]


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, importance: Importance = "token") -> Tensor:
    """Return how much more likely each token (or completion) is now than when it was sampled.

        token:     c[i, t] = pi(x[i, t]) / pi_old(x[i, t])
        sequence:  c[i]    = (pi(x[i]) / pi_old(x[i]))^(1 / n_i)       geometric mean over the n_i tokens

    Args:
        logprobs, old_logprobs: [B, T] in nats; only `logprobs` carries the gradient.
        mask: [B, T] True where a token was sampled.
    Returns: [B, T] for "token", 1 where the mask is False; [B, 1] for "sequence".
    Source: GSPO (arXiv 2507.18071) for "sequence".
    """
    log_ratio = (logprobs - old_logprobs.detach()).where(mask, 0.0)  # mask first: see kl.py
    log_ratio = log_ratio.clamp(max=80.0)  # exp of 89 is inf, and its gradient NaN even where the ratio is clipped
    if importance == "token":
        return log_ratio.exp()
    if importance == "sequence":
        return (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    raise ValueError(f'importance must be "token" or "sequence", got {importance!r}')


def sampler_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, correction: Correction = "sequence", cap: float = 2.0
) -> Tensor:
    """Return importance weights for completions that another program (such as vLLM) sampled.

        sequence:  w[i]    = min(prod_t pi_old(x[i, t]) / mu(x[i, t]), C)
        token:     w[i, t] = min(pi_old(x[i, t]) / mu(x[i, t]), C)

    mu is the sampler's distribution: the same model, but with other kernels and other rounding. Without a cap,
    "sequence" weights turn every expectation under mu into the one under pi_old. "token" weights are biased, because
    they ignore that the tokens before and after also came from mu, but vary less for long completions. The cap
    reduces variance and adds bias.

    Args:
        logprobs: [B, T] log pi_old in nats, computed with the policy before its first update.
        sampler_logprobs: [B, T] log mu in nats, reported by the sampler.
        mask: [B, T] True where a token was sampled.
        correction: "sequence" or "token", see above.
        cap: C, at least 1.
    Returns: [B, 1] or [B, T] (1 where the mask is False), without gradient.
    Source: Yao et al. (2025), "Your efficient RL framework secretly brings you off-policy RL training", for the
        truncated token ratio; TRL's vllm_importance_sampling_mode has both.

    >>> ours, theirs = torch.tensor([[0.5, 0.9]]).log(), torch.tensor([[0.4, 0.6]]).log()
    >>> mask = torch.tensor([[True, True]])
    >>> sampler_weights(ours, theirs, mask)  # 1.25 * 1.5
    tensor([[1.8750]])
    >>> sampler_weights(ours, theirs, mask, correction="token", cap=1.4)
    tensor([[1.2500, 1.4000]])
    """
    log_ratio = (logprobs - sampler_logprobs).detach().where(mask, 0.0)  # mask first: see kl.py
    if correction == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True)
    elif correction != "token":
        raise ValueError(f'correction must be "sequence" or "token", got {correction!r}')
    return log_ratio.exp().clamp(max=cap)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    importance: Importance = "token",
) -> Tensor:
    """Return the clipped objective of each token (an objective: larger is better).

        min(c A, clip(c, 1 - eps, 1 + eps_high) A)

    The minimum removes the gradient where the policy has already moved far enough in A's direction
    (c > 1 + eps_high with A > 0, c < 1 - eps with A < 0), but not where it has moved the wrong way.

    Args:
        logprobs: [B, T] log pi of the sampled tokens, in nats; carries the gradient.
        old_logprobs: [B, T] log pi_old of the same tokens, from when they were sampled.
        advantages: [B], or [B, T] if each token has its own.
        mask: [B, T] True where a token was sampled, the end token included.
        clip_range: eps.
        clip_range_high: eps_high; None means eps.
        importance: "token" (GRPO) or "sequence" (GSPO).
    Returns: [B, T], zero where the mask is False.
    Source: PPO (arXiv 1707.06347), equation 7; "clip higher" from DAPO (arXiv 2503.14476).

    >>> two = torch.tensor([[2.0]]).log()  # c = 2: twice as likely as when it was sampled
    >>> mask = torch.tensor([[True]])
    >>> clipped_surrogate(two, torch.zeros(1, 1), torch.tensor([1.0]), mask)  # far enough: clipped
    tensor([[1.2000]])
    >>> clipped_surrogate(two, torch.zeros(1, 1), torch.tensor([-1.0]), mask)  # wrong way: not clipped
    tensor([[-2.]])
    """
    ratio = importance_ratio(logprobs, old_logprobs, mask, importance)
    advantages = _per_token(advantages)
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + high)
    return torch.minimum(ratio * advantages, clipped * advantages).where(mask, 0.0)


def cispo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range_high: float,
    importance: Importance = "token",
) -> Tensor:
    """Return the CISPO objective of each token: REINFORCE with a capped weight, so no token loses its gradient.

        stop_gradient(min(c, 1 + eps_high)) A log pi

    Args: see `clipped_surrogate`; the cap is 1 + clip_range_high (TRL's option is the cap itself).
    Returns: [B, T], zero where the mask is False.
    Source: MiniMax-M1 (arXiv 2506.13585), CISPO.
    """
    weight = importance_ratio(logprobs, old_logprobs, mask, importance).clamp(max=1 + clip_range_high).detach()
    return (weight * _per_token(advantages) * logprobs).where(mask, 0.0)


def aggregate(
    values: Tensor,
    mask: Tensor,
    how: Aggregation = "sequence-mean",
    *,
    constant: float | None = None,
    total: float | Tensor | None = None,
) -> Tensor:
    """Return one number for all tokens: a mean, in one of three ways.

        sequence-mean   mean over completions of the mean over their tokens: each completion has the same weight,
                        so each token of a long one has less (GRPO)
        token-mean      mean over all tokens: each token has the same weight (DAPO)
        constant        sum over all tokens / (completions * constant): a token's weight does not depend on any
                        length (Dr. GRPO)

    Args:
        values: [B, T].
        mask: [B, T] True where a token counts. An empty row counts as zero; an empty batch gives zero.
        how: "sequence-mean", "token-mean" or "constant", see above.
        constant: for "constant" only, in tokens; usually `max_new_tokens`.
        total: number of completions (token-mean: tokens) in the whole optimizer batch, if `values` is only a
            part of it; the results of all parts then add up to that of the whole. None: this is all of it.
    Returns: a scalar.
    Raises: ValueError for an unknown `how`, or "constant" without its constant.
    Source: DeepSeekMath (2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783).

    >>> values, mask = torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    >>> [aggregate(values, mask, how, constant=4).item() for how in ("sequence-mean", "token-mean", "constant")]
    [1.0, 1.0, 0.625]
    """
    masked = values.where(mask, 0.0)
    if how == "token-mean":
        return masked.sum() / torch.as_tensor(mask.sum() if total is None else total).clamp(min=1)
    completions = max(values.shape[0], 1) if total is None else total
    if how == "sequence-mean":
        return (masked.sum(1) / mask.sum(1).clamp(min=1)).sum() / completions
    if how == "constant":
        if constant is None:
            raise ValueError('aggregation "constant" needs its constant, in tokens: usually max_new_tokens')
        return masked.sum() / (completions * constant)
    raise ValueError(f'aggregation must be "sequence-mean", "token-mean" or "constant", got {how!r}')


@dataclass(frozen=True)
class LossTerms:
    """The loss and its parts. Only `loss` carries gradient."""

    loss: Tensor
    """[] to minimise."""
    kl: Tensor | None
    """[B, T] KL estimate of each token in nats, zero outside the mask; None without a reference."""
    ratio: Tensor
    """[B, T] or [B, 1] importance ratio."""
    clipped_low: Tensor
    """[B, T] True where c < 1 - eps and A < 0: no gradient. Always False for CISPO."""
    clipped_high: Tensor
    """[B, T] True where c > 1 + eps_high and A > 0: no gradient (CISPO: True for any A where the weight is capped)."""


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k3",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    importance: Importance = "token",
    surrogate: Surrogate = "clip",
    aggregation: Aggregation = "sequence-mean",
    constant: float | None = None,
    total: float | Tensor | None = None,
) -> LossTerms:
    """Return the GRPO loss and its parts.

        loss = - aggregate( w (surrogate(c, A) - beta KL) )

    Args:
        logprobs: [B, T] log pi of the sampled tokens, in nats; carries the gradient.
        old_logprobs: [B, T] log pi_old of the same tokens; None if the policy has not changed since it sampled them.
        advantages: [B] or [B, T].
        mask: [B, T] True where a token was sampled, the end token included.
        ref_logprobs: [B, T] log ref of the same tokens; needed if kl_coef > 0.
        weights: [B, 1] or [B, T] w, from `sampler_weights`; None means 1: the policy itself sampled.
        kl_coef, kl_estimator: beta and the estimator, see kl.py.
        clip_range, clip_range_high, importance: see `clipped_surrogate`.
        surrogate: "clip" (PPO's minimum) or "cispo".
        aggregation, constant, total: see `aggregate`.
    Returns: LossTerms.
    Raises: ValueError if kl_coef > 0 without ref_logprobs.
    Source: DeepSeekMath (arXiv 2402.03300), equation 3.
    """
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef}, so ref_logprobs is needed. No reference? Use kl_coef=0.")

    objective, ratio, clipped_low, clipped_high = _policy_objective(
        logprobs, old_logprobs, advantages, mask, surrogate=surrogate,
        clip_range=clip_range, clip_range_high=clip_range_high, importance=importance,
    )  # fmt: skip
    kl = None
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs, mask, estimator=kl_estimator)
        if kl_coef > 0:
            objective = objective - kl_coef * kl
        kl = kl.detach()
    if weights is not None:
        objective = objective * weights
    loss = -aggregate(objective, mask, aggregation, constant=constant, total=total)
    return LossTerms(loss, kl, ratio, clipped_low, clipped_high)


def _policy_objective(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: Surrogate,
    clip_range: float,
    clip_range_high: float | None,
    importance: Importance,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the objective of each token and, without gradient, the ratio and where it is clipped low and high."""
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = importance_ratio(logprobs, old_logprobs, mask, importance).detach()
    if surrogate == "clip":
        objective = clipped_surrogate(
            logprobs, old_logprobs, advantages, mask,
            clip_range=clip_range, clip_range_high=high, importance=importance,
        )  # fmt: skip
        clipped_low = (ratio < 1 - clip_range) & (_per_token(advantages) < 0) & mask
        clipped_high = (ratio > 1 + high) & (_per_token(advantages) > 0) & mask
    elif surrogate == "cispo":
        objective = cispo_surrogate(
            logprobs, old_logprobs, advantages, mask, clip_range_high=high, importance=importance
        )
        clipped_low = torch.zeros_like(mask)
        clipped_high = (ratio > 1 + high) & mask
    else:
        raise ValueError(f'surrogate must be "clip" or "cispo", got {surrogate!r}')
    return objective, ratio, clipped_low, clipped_high


def _per_token(advantages: Tensor) -> Tensor:
    return advantages[:, None] if advantages.ndim == 1 else advantages
