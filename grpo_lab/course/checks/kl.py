"""The judge of the KL estimate (notebook 06)."""

from collections.abc import Callable

from torch import Tensor

from grpo_lab.algorithm.kl import kl_estimate as _kl
from grpo_lab.course.checks.inputs import FIRST, HALF, PADDED, QUARTER, YES, log_of
from grpo_lab.course.checks.judge import Case, Judge


def _k(formula: Callable, early: bool = True) -> Callable:
    # formula(d) with d = log pi - log ref
    return lambda lp, ref, mask: formula((lp - ref).where(mask | (not early), 0.0)).where(mask, 0.0)


def _k3(d: Tensor) -> Tensor:
    return (-d).exp() - 1 + d


kl_estimate = Judge(
    contract="kl_estimate(logprobs[B, T], ref_logprobs[B, T], mask[B, T]) -> k3 [B, T] in nats, 0 outside the mask",
    reference=_kl,
    gradient=True,
    hint="k3 is 0 where policy and reference agree and positive everywhere else. In which order do you subtract?",
    cases=(
        Case("where policy and reference agree, k3 and its gradient are 0", HALF, HALF, YES),
        Case("k3 is positive where the policy likes a token more than the reference does", HALF, QUARTER, YES),
        Case("k3 is positive where the policy likes a token less than the reference does", QUARTER, HALF, YES),
        Case("each token has its own number", log_of([0.5, 0.001]), log_of([0.001, 0.5]), [[True, True]]),
        Case("padding gives 0", log_of([0.5, 0.25]), log_of([0.25, 0.5]), FIRST),
        Case("values at padding must not matter, even -inf", PADDED, PADDED, FIRST),
    ),
    diagnoses={
        "your KL is k1, whose gradient is 0 on average": _k(lambda d: d),
        "your KL is k2, half the square": _k(lambda d: d**2 / 2),
        "your KL is upside down: swap policy and reference": _k(lambda d: _k3(-d)),
        "your KL has its sign flipped: k3 is never negative": _k(lambda d: -_k3(d)),
        "the linear term of your KL has the wrong sign": _k(lambda d: _k3(d) - 2 * d),
        "the linear term of your KL is missing": _k(lambda d: _k3(d) - d),
        "your KL lacks the -1: two equal policies must give 0": _k(lambda d: _k3(d) + 1),
        "you weight by the probability, but sampling has already done that": lambda p, q, m: (p.exp() * (p - q)).where(
            m, 0.0
        ),
        "you add up the tokens, but each must keep its own number": lambda *a: _kl(*a).sum(1),
        "you ignore the mask": lambda lp, ref, mask: _k3(lp - ref),
        "you multiply by the mask, but 0 times NaN is NaN": lambda lp, ref, mask: _k3(lp - ref) * mask,
        "you mask after exp, and NaN comes back with the gradient": _k(_k3, early=False),
    },
)
