"""The judges of the clipped surrogate, of the mean over tokens, and of the GRPO loss (notebooks 05 and 07)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_lab.algorithm import losses
from grpo_lab.algorithm.kl import kl_estimate as _kl
from grpo_lab.algorithm.losses import aggregate as _mean
from grpo_lab.algorithm.losses import clipped_surrogate as _gain
from grpo_lab.course.checks.inputs import BOTH, FIRST, HALF, PADDED, QUARTER, SHORT_LONG, YES, log_of
from grpo_lab.course.checks.judge import Case, Judge, keywords
from grpo_lab.course.checks.kl import kl_estimate


def _ratio(lp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return (lp - old).where(mask, 0.0).exp()


def clip_to(formula: Callable, masked: Callable = lambda gain, mask: gain.where(mask, 0.0), early=True,
          ratio: Callable = _ratio) -> Callable:  # fmt: skip
    """Return a surrogate made from formula(unclipped gain, clipped gain, ratio, advantages, clip_range)."""

    def gain(lp, old, adv, mask, clip_range=0.2):
        c, A = ratio(lp, old, mask | (not early)), adv[:, None]
        return masked(formula(c * A, c.clamp(1 - clip_range, 1 + clip_range) * A, c, A, clip_range), mask)

    return gain


def least(u, v, *_) -> Tensor:
    """Return the smaller of the unclipped and the clipped gain, which is the right formula for `clip_to`."""
    return torch.minimum(u, v)


def _mean_of_row(lp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return ((lp - old).where(mask, 0.0).sum(1, True) / mask.sum(1, True).clamp(min=1)).expand_as(lp)


clipped_surrogate = Judge(
    contract="clipped_surrogate(logprobs[B, T], old_logprobs[B, T], advantages[B], mask[B, T], *, clip_range=0.2)"
    " -> [B, T], larger is better, 0 outside the mask",
    reference=_gain,
    gradient=True,
    hint="Take the gain with and without the clip, and be pessimistic. Draw it over the ratio, for A = 1 and A = -1.",
    cases=(
        Case("where the policy has not moved, the gain is the advantage", HALF, HALF, [3.0], YES),
        Case("with a ratio of 2 and A = 1 the gain stops at 1.2", HALF, QUARTER, [1.0], YES),
        Case("with a ratio of 1/2 and A = 1 nothing is clipped", QUARTER, HALF, [1.0], YES),
        Case("with a ratio of 2 and A = -1 nothing is clipped", HALF, QUARTER, [-1.0], YES),
        Case("with a ratio of 1/2 and A = -1 the gain stops at -0.8", QUARTER, HALF, [-1.0], YES),
        Case("clip_range is the distance from 1", HALF, QUARTER, [1.0], YES, clip_range=0.5),
        Case("each row has its own advantage", log_of(*[[0.4, 0.5]] * 2), log_of(*[[0.4] * 2] * 2), [1.0, -3.0], BOTH),
        Case("padding gives 0", log_of([0.5, 0.5]), log_of([0.5, 0.5]), [1.0], FIRST),
        Case("values at padding must not matter, even -inf", PADDED, PADDED, [1.0], FIRST),
    ),
    diagnoses={
        "your clip is inverted where the advantage is negative": clip_to(lambda u, v, c, A, e: c.clamp(max=1 + e) * A),
        "you take the larger of the two, not the smaller": clip_to(lambda u, v, *_: torch.maximum(u, v)),
        "you do not clip": clip_to(lambda u, *_: u),
        "you clip even where the policy has moved the wrong way": clip_to(lambda u, v, *_: v),
        "your clip has no lower end": clip_to(lambda u, v, c, A, e: least(u, c.clamp(max=1 + e) * A)),
        "your clip has no upper end": clip_to(lambda u, v, c, A, e: least(u, c.clamp(min=1 - e) * A)),
        "your ratio is inverted: it must be new over old": lambda p, old, *a, **s: _gain(-p, -old, *a, **s),
        "your ratio lacks the exp": clip_to(lambda u, v, c, A, e: least(c.log() * A, c.log().clamp(1 - e, 1 + e) * A)),
        "you divide logarithms: subtract, then exp": clip_to(least, ratio=lambda lp, old, m: (lp / old).where(m, 1.0)),
        "you take one ratio for the whole row: that is GSPO": clip_to(least, ratio=lambda *a: _mean_of_row(*a).exp()),
        "you clip the logarithm of the ratio": clip_to(lambda u, v, c, A, e: least(u, c.log().clamp(-e, e).exp() * A)),
        "you clip around 0, not around 1": clip_to(lambda u, v, c, A, e: least(u, c.clamp(-e, e) * A)),
        "your sign is flipped: here larger is better": clip_to(lambda u, v, *_: -least(u, v)),
        "you leave the advantages out": clip_to(lambda u, v, c, A, e: least(c, c.clamp(1 - e, 1 + e))),
        "your advantages run along the tokens, but there is one for each row": lambda lp, old, adv, mask, **s: _gain(
            lp, old, adv.expand_as(lp), mask, **s
        ),
        "you ignore clip_range": lambda lp, old, adv, mask: _gain(lp, old, adv, mask),
        "you ignore the mask": clip_to(least, lambda gain, mask: gain, early=False),
        "you multiply by the mask, but 0 times NaN is NaN": clip_to(least, torch.mul, early=False),
        "you mask after exp, and NaN comes back with the gradient": clip_to(least, early=False),
    },
)


def _times_mask(values: Tensor, mask: Tensor) -> Tensor:
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


aggregate = Judge(
    contract="aggregate(values[B, T], mask[B, T]) -> scalar, the mean over the rows of the mean over a row's tokens",
    reference=_mean,
    gradient=True,
    hint="Two means, one inside the other. By how many tokens does the inner one divide, in each row?",
    cases=(
        Case("one full row gives its mean", [[1.0, 2.0, 6.0]], [[True, True, True]]),
        Case("two full rows give the mean of their means", [[1.0, 2.0], [5.0, 7.0]], BOTH),
        Case("padding does not count, and does not make a row longer", [[2.0, 4.0, 9.0]], [[True, True, False]]),
        Case("each row counts the same, short or long", [[8.0, 0.0], [1.0, 3.0]], SHORT_LONG),
        Case("an empty row counts as 0", [[2.0, 4.0], [7.0, 0.0]], [[True, True], [False, False]]),
        Case("if no token counts, the result is 0", [[5.0]], [[False]]),
        Case("values at padding must not matter, even NaN", [[3.0, math.nan]], FIRST),
    ),
    diagnoses={
        "each token counts the same, so a long completion counts more": lambda v, m: _mean(v, m, "token-mean"),
        "you ignore the mask": lambda v, m: v.mean(),
        "you divide by the width of the table, not by the tokens of each row": lambda v, m: v.where(m, 0.0).mean(),
        "you add up everything, but a mean is asked for": lambda v, m: v.where(m, 0.0).sum(),
        "you add up the tokens of a row, but their mean is asked for": lambda v, m: v.where(m, 0.0).sum(1).mean(),
        "you add up the rows, but their mean is asked for": lambda v, m: _mean(v, m) * len(v),
        "you return one number for each row": lambda v, m: v.where(m, 0.0).sum(1) / m.sum(1).clamp(min=1),
        "you average position by position, down the columns": lambda v, m: _mean(v.T, m.T),
        "you flip the sign": lambda v, m: -_mean(v, m),
        "you leave out empty rows, but they count as 0": lambda v, m: _mean(v, m) * len(v) / m.any(1).sum().clamp(1),
        "you divide 0 by 0: an empty row has no tokens": lambda v, m: (v.where(m, 0.0).sum(1) / m.sum(1)).mean(),
        "you multiply by the mask, but 0 times NaN is NaN": _times_mask,
    },
)


def loss_from(gain=_gain, kl_of=_kl, mean=_mean, sign=-1.0, beta=lambda kl_coef: kl_coef) -> Callable:
    """Return a GRPO loss made from these parts; without arguments it is the right one."""

    def loss(lp, old, adv, mask, *, ref_logprobs=None, kl_coef=0.0, clip_range=0.2):
        objective = gain(lp, old, adv, mask, **keywords(gain, {"clip_range": clip_range}, {}))
        if kl_coef:
            objective = objective - beta(kl_coef) * kl_of(lp, ref_logprobs, mask)
        return sign * mean(objective, mask)

    return loss


_NEW, _OLD, _FAR = log_of([0.5, 0.3], [0.4, 0.5]), log_of([0.25, 0.5], [0.5, 0.5]), log_of([0.25, 0.25], [0.25, 0.25])
_TWO_ROWS, _EMPTY, _OFF = log_of([0.5], [0.5]), [[True], [False]], {"ref_logprobs": QUARTER, "kl_coef": 0.0}
_UNTOUCHED = "without kl_coef there is no reference: do not touch ref_logprobs then"
grpo_loss = Judge(
    contract="grpo_loss(logprobs[B, T], old_logprobs[B, T], advantages[B], mask[B, T], *, ref_logprobs=None,"
    " kl_coef=0.0, clip_range=0.2) -> scalar to be minimised (or an object whose .loss it is)",
    reference=losses.grpo_loss,
    gradient=True,
    hint="You have the pieces: token by token the gain minus kl_coef times KL, then one mean, then the sign.",
    cases=(
        *(Case(c.says, *c.inputs, **c.settings | _OFF) for c in clipped_surrogate.cases[:6]),
        Case("without kl_coef the loss is minus the gain", HALF, HALF, [3.0], YES, kl_coef=0.0, stumbles=_UNTOUCHED),
        Case("KL makes the loss larger", HALF, HALF, [0.0], YES, ref_logprobs=QUARTER, kl_coef=0.5),
        Case("each row counts the same", _NEW, _NEW, [1.0, -3.0], SHORT_LONG, ref_logprobs=_FAR, kl_coef=0.0),
        Case("the pieces work together", _NEW, _OLD, [1.0, -3.0], SHORT_LONG, ref_logprobs=_FAR, kl_coef=0.5),
        Case("an empty row counts as 0", _TWO_ROWS, _TWO_ROWS, [3.0, 1.0], _EMPTY, ref_logprobs=_TWO_ROWS, kl_coef=0.5),
        Case("padding must not matter, even -inf", PADDED, PADDED, [1.0], FIRST, ref_logprobs=PADDED, kl_coef=0.5),
    ),
    diagnoses={
        "your sign is flipped: the optimizer lowers the loss, and the gain must rise": loss_from(sign=1.0),
        "the sign of your KL term is flipped: KL makes the loss larger": loss_from(beta=lambda kl_coef: -kl_coef),
        "your KL carries no gradient": loss_from(kl_of=lambda lp, ref, mask: _kl(lp.detach(), ref, mask)),
        "your loss has no KL term": loss_from(beta=lambda kl_coef: 0.0),
        "you ignore kl_coef": loss_from(beta=lambda kl_coef: 1.0),
        "your KL is upside down and without gradient: the policy comes first": loss_from(
            kl_of=lambda lp, ref, mask: _kl(ref, lp, mask)
        ),
        "your ratio is always 1: it must compare with old_logprobs": lambda lp, old, *a, **s: loss_from()(
            lp, lp.detach(), *a, **s
        ),
        "your KL compares with the old policy, not with the reference": lambda p, q, *a, ref_logprobs=None, **s: (
            loss_from()(p, q, *a, ref_logprobs=q, **s)
        ),
        **{sentence: loss_from(gain=wrong) for sentence, wrong in clipped_surrogate.diagnoses.items()},
        **{sentence: loss_from(kl_of=wrong) for sentence, wrong in kl_estimate.diagnoses.items()},
        **{sentence: loss_from(mean=wrong) for sentence, wrong in aggregate.diagnoses.items()},
        "you ignore the mask": lambda lp, old, adv, mask, **s: loss_from()(lp, old, adv, mask | True, **s),
        "you multiply by the mask, but 0 times NaN is NaN": loss_from(
            clip_to(least, torch.mul, early=False), mean=_times_mask
        ),
    },
)
