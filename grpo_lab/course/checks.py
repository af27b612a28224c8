"""Judges for what a learner writes: right, or which mistake is it?

A judge asks a function small questions, from the simplest to the trickiest, and compares value, shape, type
and gradient. If one is wrong, it asks the classic wrong versions the same questions: the one that answers as
the learner did is the likely mistake. A judge never raises and draws no random numbers; it returns a Verdict.
A setting such as `temperature` is tried only if the function takes it. A function that hangs is waited for.

>>> group_advantages
group_advantages(rewards[P, K]) -> [P, K]; the std divides by K - 1, std_eps = 1e-4 is added to it
>>> group_advantages(lambda rewards: rewards - rewards.mean(1, keepdim=True))
[not yet] group_advantages: you subtract the mean, but divide by nothing.
    rewards   [[1, 0, 0, 1], [1, 0, 0, 0]]
    expected  [[0.8659, -0.8659, -0.8659, 0.8659], [1.5, -0.4999, -0.4999, -0.4999]]
    got       [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]]
    hint      Each row is a world of its own: take its mean away, then measure what is left in units of its own spread.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grpo_lab.algorithm import advantages, kl, logprobs, losses
from grpo_lab.course.judge import COLOURS, Case, Judge, UnreadableError, Verdict, keywords, read, show
from grpo_lab.rewards import verifiable as rewards

__all__ = ["COLOURS", "Case", "Judge", "Verdict"]  # and the judges

# Behind each sentence stands the wrong version that deserves it.

_lp, _adv, _gain, _kl = logprobs.token_logprobs, advantages.group_advantages, losses.clipped_surrogate, kl.kl_estimate
_mean, _top = losses.aggregate, logprobs.truncate


def _log(*probabilities: list) -> Tensor:
    return torch.tensor(probabilities).log()


_YES, _BOTH, _FIRST, _SHORT_LONG = [[True]], [[True] * 2] * 2, [[True, False]], [[True, False], [True] * 2]
_HALF, _QUARTER, _PADDED = _log([0.5]), _log([0.25]), _log([0.5, 0.0])


def _scored(formula: Callable) -> Callable:
    # of the logits and the tokens; the settings are right
    def logprobs_of(z, x, temperature=1.0, kept=None):
        cut = torch.zeros(()) if kept is None else (kept[..., None] != torch.arange(z.shape[-1])).all(-2)
        return formula((z / temperature).masked_fill(cut.bool(), -torch.inf), x)

    return logprobs_of


def _chosen(over_vocabulary: Callable) -> Callable:
    return _scored(lambda z, x: over_vocabulary(z).gather(-1, x[..., None]).squeeze(-1))


token_logprobs = Judge(
    contract="token_logprobs(logits[B, T, V], tokens[B, T], *, temperature=1.0) -> [B, T] in nats, with gradient",
    reference=_lp,
    gradient=True,
    hint="Over which axis do the probabilities sum to 1? And which function takes softmax and logarithm in one go?",
    cases=(
        Case("one of two equally likely tokens has log 1/2", [[[0.0, 0.0]]], [[1]]),
        Case("the probabilities are the softmax of the logits", [[[1.0, 3.0, 2.0]]], [[0]]),
        Case("position t predicts tokens[:, t]", [[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]], [[0, 1, 0]]),
        Case("rows do not mix", [[[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [4.0, 0.0]]], [[1, 1], [0, 0]]),
        Case("a hopeless token has a very negative, finite log-probability", [[[0.0, 200.0]]], [[0]]),
        Case("large logits are as good as small ones", [[[1000.0, 1001.0]]], [[0]]),
        Case("the logits are divided by the temperature", [[[1.0, 3.0, 2.0]]], [[0]], temperature=0.5),
        Case("the kept tokens share all the probability", [[[1.0, 3.0, 2.0]]], [[0]], kept=[[[0, 2, -1]]]),
    ),
    diagnoses={
        "you return probabilities, not their logarithms": lambda *a, **s: _lp(*a, **s).exp(),
        "your sign is flipped: the logarithm of a probability is never above 0": lambda *a, **s: -_lp(*a, **s),
        "you measure in bits, not in nats": lambda *a, **s: _lp(*a, **s) / math.log(2),
        "you add up the tokens, but each must keep its own number": lambda *a, **s: _lp(*a, **s).sum(1),
        "you return the raw logits: nothing makes the probabilities sum to 1": _chosen(lambda z: z),
        "you normalise over the positions, not over the vocabulary": _chosen(lambda z: z.log_softmax(1)),
        "you look every token up at every position: pick one number for each token, with gather": _scored(
            lambda z, x: z.log_softmax(-1)[:, :, x]
        ),
        "you score the likeliest token, not the chosen one": _scored(lambda z, x: z.log_softmax(-1).amax(-1)),
        "you shift by one, but position t predicts tokens[:, t] already": _scored(
            lambda z, x: _lp(z[:, :-1], x[:, 1:])
        ),
        "you score each token with the logits of the position before": _scored(lambda z, x: _lp(z.roll(1, 1), x)),
        "your probability is rounded to 0 before its logarithm is taken": _chosen(lambda z: z.softmax(-1).log()),
        "your exp overflows to infinity": _chosen(lambda z: z - z.exp().sum(-1, True).log()),
        "your exp overflows to infinity over infinity": _chosen(lambda z: (z.exp() / z.exp().sum(-1, True)).log()),
        "you ignore the temperature": lambda z, x, temperature=1.0, **s: _lp(z, x, **s),
        "you multiply by the temperature": lambda z, x, temperature=1.0, **s: _lp(z * temperature, x, **s),
        "you divide after the softmax": lambda z, x, temperature=1.0, **s: _lp(z, x, **s) / temperature,
        "you count tokens that the sampler had cut away": lambda z, x, kept=None, **s: _lp(z, x, **s),
    },
)


def _others(rewards: Tensor) -> Tensor:
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


baseline = Judge(
    contract="baseline(rewards[P, K]) -> [P, K]: for each completion the mean reward of the K - 1 others of its prompt",
    reference=_others,
    hint="The others' sum is the sum of the row less oneself. Over which axis does the sum run, and does it keep it?",
    cases=(
        Case("of two, each is measured by the other", [[1.0, 0.0], [0.0, 4.0]]),
        Case("the reward that is judged does not count", [[1.0, 0.0, 0.0, 1.0]]),
        Case("each row is a group of its own", [[1.0, 0.0, 0.0, 1.0], [5.0, 9.0, 5.0, 5.0]]),
        Case("where all rewards are equal, that is the baseline", [[3.0, 3.0, 3.0], [-1.0, -1.0, -1.0]]),
    ),
    diagnoses={
        "you return the advantages: here only the baseline is asked for": lambda r: r - _others(r),
        "your mean holds the very reward that is judged": lambda r: r.mean(1, keepdim=True).expand_as(r),
        "your mean is that of all rewards, not of each group": lambda r: r.mean().expand_as(r),
        "you leave one out of all rewards, not of each group": lambda r: (r.sum() - r) / (r.numel() - 1),
        "you average over the prompts, not in each group": lambda r: r.mean(0).expand_as(r),
        "you leave one out of the prompts, not of the group": lambda r: (r.sum(0) - r) / (len(r) - 1),
        "your sum has lost its column: keepdim=True": lambda r: (r.sum(1) - r) / (r.shape[1] - 1),
        "your mean has lost its column: keepdim=True": lambda r: r.mean(1).expand_as(r),
        "you add up the others, but their mean is asked for": lambda r: r.sum(1, keepdim=True) - r,
        "you divide by K, but the others are K - 1": lambda r: (r.sum(1, keepdim=True) - r) / r.shape[1],
        "you leave the division by K - 1 to the sum only": lambda r: r.sum(1, keepdim=True) / (r.shape[1] - 1) - r,
        "you return the rewards as they came": lambda r: r.clone(),
    },
)


def _reinforce(sign=-1.0, rank=lambda r: r - _others(r), of=lambda lp: lp, mean=torch.mean) -> Callable:
    return lambda lp, rewards: sign * mean(rank(rewards) * of(lp))


_DRAWN = _log([0.5, 0.25], [0.25, 0.5])
reinforce_loss = Judge(
    contract="reinforce_loss(logprobs[P, K], rewards[P, K]) -> scalar to be minimised: minus the mean of advantage"
    " times log-probability, the advantage being the reward less the mean of the K - 1 others",
    reference=_reinforce(),
    gradient=True,
    hint="Its gradient by a log-probability is -A / (P K): a positive advantage must make the loss fall.",
    cases=(
        Case("the loss is minus the mean of A log pi", _DRAWN[:1], [[1.0, 0.0]]),
        Case("equal rewards push nothing", _DRAWN[:1], [[1.0, 1.0]]),
        Case("an offset of all rewards changes nothing", _DRAWN[:1], [[11.0, 10.0]]),
        Case("each row is a group of its own", _DRAWN, [[1.0, 0.0], [0.0, 3.0]]),
        Case("the others are K - 1", _log([0.5, 0.3, 0.1, 0.1]), [[1.0, 0.0, 0.0, 1.0]]),
    ),
    diagnoses={
        "your sign is flipped: the optimizer walks down, good words must go up": _reinforce(sign=1.0),
        "you leave the baseline out": _reinforce(rank=lambda r: r),
        "you weigh by the baseline, not by the reward less the baseline": _reinforce(rank=_others),
        "you use probabilities, not their logarithms": _reinforce(of=torch.exp),
        "you add up, but the mean is asked for": _reinforce(mean=torch.sum),
        "your baseline is the group's mean, with oneself in it": _reinforce(rank=lambda r: r - r.mean(1, keepdim=True)),
        "your baseline is the mean of all rewards": _reinforce(rank=lambda r: r - r.mean()),
        "you take the baseline from the product: it must be taken from the reward": lambda lp, r: (
            -(r * lp - _others(r)).mean()
        ),
        "your baseline is made of log-probabilities, and its gradient counts too": lambda lp, r: (
            -(r * lp - _others(r * lp)).mean()
        ),
    },
)


def _ends(tokens: Tensor, end_ids: list[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(end_ids))


def _until_end(tokens: Tensor, end_ids: list[int]) -> Tensor:
    ends = _ends(tokens, end_ids).long()
    return ends.cumsum(1) - ends == 0  # no end token strictly before


completion_mask = Judge(
    contract="completion_mask(tokens[B, T], end_ids: list[int]) -> bool [B, T], True to the first end token, included",
    reference=_until_end,
    hint="A token counts if no end token stands before it. Before it, not at it.",
    cases=(
        Case("without an end token every token counts", [[5, 6]], (1,)),
        Case("the end token counts, what follows does not", [[5, 1, 6]], (1,)),
        Case("an end token at the start leaves one token", [[1, 5]], (1,)),
        Case("padding may look like the end token: only the first one counts", [[5, 1, 1]], (1,)),
        Case("nothing counts after the first end token", [[5, 1, 6, 1, 7]], (1,)),
        Case("any of the end ids ends a completion", [[5, 2, 6], [5, 1, 2]], (1, 2)),
        Case("each row ends for itself", [[5, 6, 1, 0], [1, 5, 6, 7], [5, 6, 7, 8]], (1,)),
    ),
    diagnoses={
        "you drop the end token, but it was sampled and must be learned": lambda x, e: _ends(x, e).cumsum(1) == 0,
        "you hide the end tokens, but not what follows": lambda x, e: ~_ends(x, e),
        "your mask is upside down: True means that a token counts": lambda x, e: ~_until_end(x, e),
        "you let everything count": lambda x, e: x == x,
        "you let padding count that looks like the end token": lambda x, e: _until_end(x, e) | _ends(x, e),
        "you cut at the last end token, not at the first": lambda x, e: (
            _ends(x, e).flip(1).cumsum(1).flip(1).bool() | ~_ends(x, e).any(1, keepdim=True)
        ),
        "you drop the padding id only: what follows the end need not be padding": lambda x, e: x != 0,
        "you look for one of the end ids only": lambda x, e: _until_end(x, e[:1]),
        "you look for an end where there is none: argmax of all False is 0": lambda x, e: (
            torch.arange(x.shape[1]) <= _ends(x, e).long().argmax(1, keepdim=True)
        ),
        "you cut all rows where the shortest one ends": lambda x, e: _until_end(x, e).all(0).expand_as(x),
    },
)


def _group(formula: Callable) -> Callable:
    return lambda r: formula(r, r.mean(1, keepdim=True), r.std(1, keepdim=True))


group_advantages = Judge(
    contract="group_advantages(rewards[P, K]) -> [P, K]; the std divides by K - 1, std_eps = 1e-4 is added to it",
    reference=_adv,
    hint="Each row is a world of its own: take its mean away, then measure what is left in units of its own spread.",
    cases=(
        # std_eps comes later
        Case("the mean of a group becomes 0, its spread 1", [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]], atol=3e-4),
        Case("better than the group is positive, below zero too", [[-30.0, -10.0, -25.0]]),
        Case("each row is a group of its own", [[10.0, 0.0, 0.0, 10.0], [50.0, 90.0, 50.0, 50.0]]),
        Case("a group whose rewards are all equal gets 0", [[1.0, 1.0]]),
        # the plain formula leaves 6e-4 of rounding here, which does no harm
        Case("a group whose rewards are all equal gets 0", [[0.3] * 7, [0.7] * 7], atol=2e-3),
        Case("std_eps = 1e-4 is added to the std", [[0.001, 0.0]]),
    ),
    diagnoses={
        "you subtract the mean, but divide by nothing": _group(lambda r, m, s: r - m),
        "you divide by the spread, but do not subtract the mean": _group(lambda r, m, s: r / (s + 1e-4)),
        "you return the rewards as they came": lambda r: r.clone(),
        "your sign is flipped: better than the group is positive": _group(lambda r, m, s: (m - r) / (s + 1e-4)),
        "your std divides by K, not by K - 1": lambda r: (r - r.mean(1, True)) / (r.std(1, False, True) + 1e-4),
        "you divide by the variance, not by the std": _group(lambda r, m, s: (r - m) / (s**2 + 1e-4)),
        "your mean and std are those of all rewards, not of each group": lambda r: (r - r.mean()) / (r.std() + 1e-4),
        "your std is that of all rewards, not of each group": _group(lambda r, m, s: (r - m) / (r.std() + 1e-4)),
        "your mean is that of all rewards, not of each group": _group(lambda r, m, s: (r - r.mean()) / (s + 1e-4)),
        "you average over the prompts, not in each group": lambda r: (r - r.mean(0)) / (r.std(0) + 1e-4),
        "your mean or std has lost its column: keepdim=True": lambda r: (r - r.mean(1)) / (r.std(1) + 1e-4),
        "a bracket is missing: the mean is taken away before you divide": _group(lambda r, m, s: r - m / (s + 1e-4)),
        "a bracket is missing: std_eps is added to the std, not to the quotient": _group(
            lambda r, m, s: (r - m) / s + 1e-4
        ),
        "you compare with the others only, not with the whole group": lambda r: _adv(r, baseline="leave-one-out"),
        "you divide 0 by 0: nothing keeps the division finite": _group(lambda r, m, s: (r - m) / s),
        "your std_eps is inside the root": _group(lambda r, m, s: (r - m) / (s**2 + 1e-4).sqrt()),
        "your std_eps is so small that rounding becomes an advantage": _group(lambda r, m, s: (r - m) / (s + 1e-8)),
    },
)


def _ratio(lp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return (lp - old).where(mask, 0.0).exp()


def _clip(formula: Callable, masked: Callable = lambda gain, mask: gain.where(mask, 0.0), early=True,
          ratio: Callable = _ratio) -> Callable:  # fmt: skip
    # formula: of the unclipped gain, the clipped one, the ratio, the advantages and eps
    def gain(lp, old, adv, mask, clip_range=0.2):
        c, A = ratio(lp, old, mask | (not early)), adv[:, None]
        return masked(formula(c * A, c.clamp(1 - clip_range, 1 + clip_range) * A, c, A, clip_range), mask)

    return gain


def _least(u, v, *_) -> Tensor:
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
        Case("where the policy has not moved, the gain is the advantage", _HALF, _HALF, [3.0], _YES),
        Case("with a ratio of 2 and A = 1 the gain stops at 1.2", _HALF, _QUARTER, [1.0], _YES),
        Case("with a ratio of 1/2 and A = 1 nothing is clipped", _QUARTER, _HALF, [1.0], _YES),
        Case("with a ratio of 2 and A = -1 nothing is clipped", _HALF, _QUARTER, [-1.0], _YES),
        Case("with a ratio of 1/2 and A = -1 the gain stops at -0.8", _QUARTER, _HALF, [-1.0], _YES),
        Case("clip_range is the distance from 1", _HALF, _QUARTER, [1.0], _YES, clip_range=0.5),
        Case("each row has its advantage", _log(*[[0.4, 0.5]] * 2), _log(*[[0.4] * 2] * 2), [1.0, -3.0], _BOTH),
        Case("padding gives 0", _log([0.5, 0.5]), _log([0.5, 0.5]), [1.0], _FIRST),
        Case("what stands at padding must not matter, be it -inf", _PADDED, _PADDED, [1.0], _FIRST),
    ),
    diagnoses={
        "your clip is inverted where the advantage is negative": _clip(lambda u, v, c, A, e: c.clamp(max=1 + e) * A),
        "you take the larger of the two, not the smaller": _clip(lambda u, v, *_: torch.maximum(u, v)),
        "you do not clip": _clip(lambda u, *_: u),
        "you clip even where the policy must come back": _clip(lambda u, v, *_: v),
        "your clip has no lower end": _clip(lambda u, v, c, A, e: _least(u, c.clamp(max=1 + e) * A)),
        "your clip has no upper end": _clip(lambda u, v, c, A, e: _least(u, c.clamp(min=1 - e) * A)),
        "your ratio is upside down: it is new over old": lambda p, old, *a, **s: _gain(-p, -old, *a, **s),
        "your ratio lacks its exp": _clip(lambda u, v, c, A, e: _least(c.log() * A, c.log().clamp(1 - e, 1 + e) * A)),
        "you divide logarithms: subtract, then exp": _clip(_least, ratio=lambda lp, old, m: (lp / old).where(m, 1.0)),
        "you take one ratio for the whole row: that is GSPO": _clip(_least, ratio=lambda *a: _mean_of_row(*a).exp()),
        "you clip the logarithm of the ratio": _clip(lambda u, v, c, A, e: _least(u, c.log().clamp(-e, e).exp() * A)),
        "you clip around 0, not around 1": _clip(lambda u, v, c, A, e: _least(u, c.clamp(-e, e) * A)),
        "your sign is flipped: here larger is better": _clip(lambda u, v, *_: -_least(u, v)),
        "you leave the advantages out": _clip(lambda u, v, c, A, e: _least(c, c.clamp(1 - e, 1 + e))),
        "your advantages run along the tokens, but there is one for each row": lambda lp, old, adv, mask, **s: _gain(
            lp, old, adv.expand_as(lp), mask, **s
        ),
        "you ignore clip_range": lambda lp, old, adv, mask: _gain(lp, old, adv, mask),
        "you ignore the mask": _clip(_least, lambda gain, mask: gain, early=False),
        "you multiply by the mask, but 0 times NaN is NaN": _clip(_least, torch.mul, early=False),
        "you mask after exp, and NaN comes back with the gradient": _clip(_least, early=False),
    },
)


def _k(formula: Callable, early: bool = True) -> Callable:
    # formula: of d = log pi - log ref
    return lambda lp, ref, mask: formula((lp - ref).where(mask | (not early), 0.0)).where(mask, 0.0)


def _k3(d: Tensor) -> Tensor:
    return (-d).exp() - 1 + d


kl_estimate = Judge(
    contract="kl_estimate(logprobs[B, T], ref_logprobs[B, T], mask[B, T]) -> k3 [B, T] in nats, 0 outside the mask",
    reference=_kl,
    gradient=True,
    hint="k3 is 0 where policy and reference agree and positive everywhere else. Which way round do you subtract?",
    cases=(
        Case("where policy and reference agree, k3 and its gradient are 0", _HALF, _HALF, _YES),
        Case("k3 is positive where the policy likes a token more than the reference does", _HALF, _QUARTER, _YES),
        Case("k3 is positive where the policy likes a token less than the reference does", _QUARTER, _HALF, _YES),
        Case("each token has its own number", _log([0.5, 0.001]), _log([0.001, 0.5]), [[True, True]]),
        Case("padding gives 0", _log([0.5, 0.25]), _log([0.25, 0.5]), _FIRST),
        Case("what stands at padding must not matter, be it -inf", _PADDED, _PADDED, _FIRST),
    ),
    diagnoses={
        "your KL is k1, whose gradient is 0 on average": _k(lambda d: d),
        "your KL is k2, half the square": _k(lambda d: d**2 / 2),
        "your KL is upside down: swap policy and reference": _k(lambda d: _k3(-d)),
        "your KL has its sign flipped: k3 is never negative": _k(lambda d: -_k3(d)),
        "the linear term of your KL has the wrong sign": _k(lambda d: _k3(d) - 2 * d),
        "the linear term of your KL is missing": _k(lambda d: _k3(d) - d),
        "your KL lacks its -1: no difference must mean no KL": _k(lambda d: _k3(d) + 1),
        "you weight by the probability, but the sampling did that": lambda p, q, m: (p.exp() * (p - q)).where(m, 0.0),
        "you add up the tokens, but each must keep its own number": lambda *a: _kl(*a).sum(1),
        "you ignore the mask": lambda lp, ref, mask: _k3(lp - ref),
        "you multiply by the mask, but 0 times NaN is NaN": lambda lp, ref, mask: _k3(lp - ref) * mask,
        "you mask after exp, and NaN comes back with the gradient": _k(_k3, early=False),
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
        Case("of one full row: its mean", [[1.0, 2.0, 6.0]], [[True, True, True]]),
        Case("of two full rows: the mean of their means", [[1.0, 2.0], [5.0, 7.0]], _BOTH),
        Case("padding does not count, and does not make a row longer", [[2.0, 4.0, 9.0]], [[True, True, False]]),
        Case("each row counts the same, short or long", [[8.0, 0.0], [1.0, 3.0]], _SHORT_LONG),
        Case("an empty row counts as 0", [[2.0, 4.0], [7.0, 0.0]], [[True, True], [False, False]]),
        Case("where nothing counts, the result is 0", [[5.0]], [[False]]),
        Case("what stands at padding must not matter, be it NaN", [[3.0, math.nan]], _FIRST),
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


def _loss(gain=_gain, kl_of=_kl, mean=_mean, sign=-1.0, beta=lambda kl_coef: kl_coef) -> Callable:
    def loss(lp, old, adv, mask, *, ref_logprobs=None, kl_coef=0.0, clip_range=0.2):
        objective = gain(lp, old, adv, mask, **keywords(gain, {"clip_range": clip_range}, {}))
        if kl_coef:
            objective = objective - beta(kl_coef) * kl_of(lp, ref_logprobs, mask)
        return sign * mean(objective, mask)

    return loss


_NEW, _OLD, _FAR = _log([0.5, 0.3], [0.4, 0.5]), _log([0.25, 0.5], [0.5, 0.5]), _log([0.25, 0.25], [0.25, 0.25])
_TWO_ROWS, _EMPTY, _OFF = _log([0.5], [0.5]), [[True], [False]], {"ref_logprobs": _QUARTER, "kl_coef": 0.0}
_UNTOUCHED = "without kl_coef there is no reference: do not touch ref_logprobs then"
grpo_loss = Judge(
    contract="grpo_loss(logprobs[B, T], old_logprobs[B, T], advantages[B], mask[B, T], *, ref_logprobs=None,"
    " kl_coef=0.0, clip_range=0.2) -> scalar to be minimised (or an object whose .loss it is)",
    reference=losses.grpo_loss,
    gradient=True,
    hint="You have the pieces: token by token the gain minus kl_coef times KL, then one mean, then the sign.",
    cases=(
        *(Case(c.says, *c.inputs, **c.settings | _OFF) for c in clipped_surrogate.cases[:6]),
        Case("without kl_coef the gain is all", _HALF, _HALF, [3.0], _YES, kl_coef=0.0, stumbles=_UNTOUCHED),
        Case("KL makes the loss larger", _HALF, _HALF, [0.0], _YES, ref_logprobs=_QUARTER, kl_coef=0.5),
        Case("rows count the same", _NEW, _NEW, [1.0, -3.0], _SHORT_LONG, ref_logprobs=_FAR, kl_coef=0.0),
        Case("the pieces work together", _NEW, _OLD, [1.0, -3.0], _SHORT_LONG, ref_logprobs=_FAR, kl_coef=0.5),
        Case("an empty row counts as 0", _TWO_ROWS, _TWO_ROWS, [3.0, 1.0], _EMPTY, ref_logprobs=_TWO_ROWS, kl_coef=0.5),
        Case("padding must not matter, be it -inf", _PADDED, _PADDED, [1.0], _FIRST, ref_logprobs=_PADDED, kl_coef=0.5),
    ),
    diagnoses={
        "your sign is flipped: the optimizer walks down, the gain must go up": _loss(sign=1.0),
        "the sign of your KL term is flipped: KL makes the loss larger": _loss(beta=lambda kl_coef: -kl_coef),
        "your KL carries no gradient": _loss(kl_of=lambda lp, ref, mask: _kl(lp.detach(), ref, mask)),
        "your loss has no KL term": _loss(beta=lambda kl_coef: 0.0),
        "you ignore kl_coef": _loss(beta=lambda kl_coef: 1.0),
        "your KL is upside down and without gradient: the policy comes first": _loss(
            kl_of=lambda lp, ref, mask: _kl(ref, lp, mask)
        ),
        "your ratio is always 1: it must compare with old_logprobs": lambda lp, old, *a, **s: _loss()(
            lp, lp.detach(), *a, **s
        ),
        "your KL is that to the old policy": lambda p, q, *a, ref_logprobs=None, **s: _loss()(
            p, q, *a, ref_logprobs=q, **s
        ),
        **{sentence: _loss(gain=wrong) for sentence, wrong in clipped_surrogate.diagnoses.items()},
        **{sentence: _loss(kl_of=wrong) for sentence, wrong in kl_estimate.diagnoses.items()},
        **{sentence: _loss(mean=wrong) for sentence, wrong in aggregate.diagnoses.items()},
        "you ignore the mask": lambda lp, old, adv, mask, **s: _loss()(lp, old, adv, mask | True, **s),
        "you multiply by the mask, but 0 times NaN is NaN": _loss(
            _clip(_least, torch.mul, early=False), mean=_times_mask
        ),
    },
)


def _kept(fn: Callable) -> Callable:
    # ids padded with -1, a mask of the vocabulary, logits with -inf, None for "nothing is cut": all become a mask
    def mask(logits, **settings):
        answer = fn(logits, **settings)
        if answer is None and _top(logits, **settings) is None:
            return torch.ones_like(logits, dtype=torch.bool)
        if answer is None or answer is ...:
            return answer
        answer, vocabulary = read(answer), torch.arange(logits.shape[-1])
        if answer.dtype == torch.bool:
            return answer
        for t in (1.0, settings.get("temperature", 1.0)):
            kept = answer > -torch.inf
            if answer.shape == logits.shape and torch.allclose(answer[kept].double(), (logits / t)[kept].double()):
                return kept
        counts = (answer.unsqueeze(-1) == vocabulary).sum(-2) if answer.ndim else answer
        known = (answer == -1) | (answer.unsqueeze(-1) == vocabulary).any(-1)
        if counts.shape != logits.shape or counts.max() > 1 or not known.all():
            raise UnreadableError(f"ids (-1 for padding), a mask, or logits with -inf where cut, not {show(answer)}")
        return counts > 0

    return mask


def _cut(keep=lambda p, total, top_p: total - p < top_p, sort=True, back=True, after_top_k=True, hot=True) -> Callable:
    # keep: of the probabilities from the likeliest down, their running sum and top_p
    def cut(logits, temperature=1.0, top_k=0, top_p=1.0):
        z = logits / temperature if hot else logits
        order = z.argsort(-1, descending=True)
        first = order.argsort(-1) < (top_k or z.shape[-1])
        p = (z.masked_fill(~first, -torch.inf) if after_top_k else z).softmax(-1)
        order = order if sort else torch.arange(z.shape[-1]).expand_as(order)
        p, first = p.gather(-1, order), first.gather(-1, order)
        kept = first & (keep(p, p.cumsum(-1), top_p) | (top_p >= 1))
        return torch.zeros_like(kept).scatter(-1, order, kept) if back else kept

    return cut


_FOUR = _log([0.15, 0.5, 0.05, 0.3])
truncate = Judge(
    contract="truncate(logits[..., V], *, temperature=1.0, top_k=0, top_p=1.0) -> the ids kept [..., k], -1 for padding"
    " (or a mask [..., V], or the logits with -inf where cut)",
    reference=_top,
    adapt=_kept,
    hint="Sort, add up from the top, ask of each token how much stands before it, and put the answer back in place.",
    cases=(
        Case("top_k = 1 keeps the likeliest token", [[0.0, 2.0, 1.0]], top_k=1),
        Case("top_k = 2 keeps the two likeliest, wherever they stand", _FOUR, top_k=2),
        Case("top_k = 0 keeps all", [[0.0, 2.0, 1.0]], top_k=0),
        Case("top_k larger than the vocabulary keeps all", [[0.0, 2.0, 1.0]], top_k=4),
        Case("1/2 alone reaches top_p = 0.4", _FOUR, top_p=0.4),
        Case("1/2 alone does not reach top_p = 0.7: the token that reaches it is kept too", _FOUR, top_p=0.7),
        Case("the likeliest token is kept however small top_p is", _FOUR, top_p=0.01),
        Case("top_p = 1 keeps all", _FOUR, top_p=1.0),
        Case("each row is cut for itself", _log([0.05, 0.15, 0.8], [0.3, 0.31, 0.39]), top_p=0.75),
        Case("what top_k has left sums to 1 again: 0.5 of 0.8 reaches top_p = 0.6", _FOUR, top_k=2, top_p=0.6),
        Case("the temperature comes first: it makes the likeliest less likely", _FOUR, top_p=0.75, temperature=2.0),
    ),
    diagnoses={
        "you keep the unlikeliest tokens": lambda z, **s: _top(-z, **s),
        "you drop the token that reaches top_p": _cut(lambda p, total, top_p: total <= top_p),
        "you compare top_p with each probability alone": _cut(lambda p, total, top_p: (p >= top_p) | (total == p)),
        "you add up the probabilities unsorted": _cut(sort=False),
        "you forget to put the tokens back from the sorted order": _cut(back=False),
        "you measure top_p on all tokens, though top_k comes first": _cut(after_top_k=False),
        "you ignore the temperature": _cut(hot=False),
        "you ignore top_p": _cut(lambda p, total, top_p: p >= 0),
        "you ignore top_k": lambda z, top_k=0, **s: _cut()(z, **s),
    },
)


def _countdown(numbers=lambda used, given: used == given, value=lambda got, target: got == target, order=sorted,
               none=lambda got: got is None) -> Callable:  # fmt: skip
    def one(prompt, completion):
        given, target = prompt.rstrip("=").split(":")
        given, got = order(map(int, given.split(","))), rewards.evaluate_expression(completion)
        return 0.0 if none(got) else float(bool(value(got[0], int(target)) and numbers(got[1], given)))

    return lambda prompts, completions: list(map(one, prompts, completions))


def _unpacked(got) -> bool:
    _value, _used = got
    return False


reward = Judge(
    contract='reward(prompts, completions) -> list of 1.0 or 0.0; for the prompt "3,5,7:22=" "3*5+7" is right',
    reference=rewards.countdown,
    hint="Two questions, both must be yes: which numbers were used, and what do they come to? Anything odd earns 0.",
    cases=(
        Case("an expression that uses each number once and hits the target earns 1", ("3,5,7:22=",), ("3*5+7",)),
        Case("another value than the target earns 0", ("3,5,7:22=",), ("3*5-7",)),
        Case("the order is free, and brackets are allowed", ("1,2,3:9=",), ("3*(2+1)",)),
        Case("the prompt's numbers may stand in any order too", ("7,5,3:22=",), ("3*5+7",)),
        Case("0 is a target like any other", ("3,4,7:0=",), ("3+4-7",)),
        Case("-2 is not 2", ("2,3,7:2=",), ("2+3-7",)),
        Case("the bare target uses none of the numbers", ("3,5,7:22=",), ("22",)),
        Case("each number must be used", ("3,5,7:15=",), ("3*5",)),
        Case("a number that is given twice must be used twice", ("3,3,5:8=",), ("3+5",)),
        Case("no other number may be used", ("3,5,7:22=",) * 2, ("9+9+4", "3*5+7+1-1")),
        Case("35 is one number, not a 3 and a 5", ("3,5,7:42=",), ("35+7",)),
        Case("7/2 is 3.5, not 3", ("1,2,7:3=",), ("1*7/2",)),
        Case("a fraction on the way is fine", ("3,6,8:4=",), ("8/6*3",)),
        Case("what is no expression earns 0", ("3,5,7:22=",) * 3, ("", "3*5+", "I think 3*5+7")),
        Case("what follows the expression counts too", ("3,5,7:22=",), ("3*5+7=22",)),
        Case("a division by zero earns 0", ("3,3,7:0=",), ("7/(3-3)",)),
        Case("only + - * / count: a power such as 9**9**9**9 would never end", ("1,2,3:7=",), ("2**3-1",)),
        Case("a completion is a text to be read, never a program to be run", ("3,5,7:22=",), ("(lambda: 3*5+7)()",)),
        Case("only + - * / count, and // is none of them", ("1,2,7:3=",), ("1*7//2",)),
        Case("each completion has its own prompt", ("3,5,7:22=", "1,2,3:6="), ("3*5+7", "3*5+7")),
        Case("each completion gets its own reward", ("1,2,3:6=",) * 3, ("1+2+3", "1*2*3", "1+2-3")),
    ),
    diagnoses={
        "you do not look at the numbers that were used": _countdown(numbers=lambda used, given: True),
        "you do not look at the value": _countdown(value=lambda got, target: True),
        "right and wrong are swapped": lambda *a: [1 - r for r in _countdown()(*a)],
        "nothing ever earns a reward": lambda prompts, completions: [0.0] * len(completions),
        "you compare sets, which forget how often": _countdown(numbers=lambda used, given: set(used) == set(given)),
        "you let numbers be left out": _countdown(numbers=lambda used, given: set(used) <= set(given)),
        "you let numbers be used that were not given": _countdown(numbers=lambda used, given: set(used) >= set(given)),
        "you compare with the prompt's numbers unsorted; evaluate_expression sorts those used": _countdown(order=list),
        "you take the value 0 for no value": _countdown(value=lambda got, target: got and got == target),
        "you forget the sign": _countdown(value=lambda got, target: abs(got) == target),
        "evaluate_expression returns None for what is no expression": _countdown(none=lambda got: got[0] is None),
        "evaluate_expression returns None, and no pair, for what is no expression": _countdown(none=_unpacked),
        "you cut off fractions": _countdown(value=lambda got, target: int(got) == target),
        "you judge all completions by the first prompt": lambda p, c: _countdown()(p[:1] * len(c), c),
    },
)


class _Policy(nn.Module):
    """The smallest policy: a weight for each token of the vocabulary, whatever came before."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights, self.calls = nn.Parameter(weights.clone()), 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return self.weights.expand(*tokens.shape, -1)


class _Asked:
    """The policy as notebook 07 hands it over: a function from tokens to logits, and nothing else."""

    def __init__(self, policy: _Policy):
        self.policy = policy

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.policy(tokens)

    def __getattr__(self, name: str):
        raise AttributeError("model is only a function here; empty the gradients through optimizer")


def _weights_after(fn: Callable) -> Callable:
    def play(weights, gradient, tokens, mask, rewards, old_logprobs, **s):
        policy = _Policy(weights)
        policy.weights.grad = gradient.clone()
        optimizer = torch.optim.SGD([policy.weights], lr=1.0)
        result = fn(_Asked(policy), optimizer, tokens, mask, rewards, old_logprobs, **s)
        return result if policy.calls == 0 and (result is None or result is ...) else policy.weights.detach()

    return play


def _flat(rewards: Tensor) -> Tensor:
    return _adv(rewards).flatten()


def _step(order="zero_grad backward step", rank=_flat, loss=_loss(), old_of=lambda lp, old: old, score=_lp,  # noqa: B008
          times=1, penalty=True) -> Callable:  # fmt: skip
    def step(model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0):
        for _ in range(times):
            lp = score(model(tokens), tokens)
            settings = {"ref_logprobs": ref_logprobs, "kl_coef": kl_coef} if penalty else {}
            value = loss(lp, old_of(lp, old_logprobs), rank(rewards), mask, **settings)
            for do in order.split():
                value.backward() if do == "backward" else getattr(optimizer, do)()

    return step


_TWO = [0.0, 0.0], [0.0, 0.0], [[0], [1]], [[True]] * 2, [[10.0, 0.0]]
training_step = Judge(
    contract="training_step(model, optimizer, tokens[B, T], mask[B, T], rewards[P, K], old_logprobs[B, T],"
    " ref_logprobs=None, kl_coef=0.0): one update, clip_range 0.2; model(tokens) -> logits [B, T, V], position t"
    " predicts tokens[:, t]; return what you like",
    reference=_step(),
    adapt=_weights_after,
    hint="Log-probabilities, advantages, loss; then the lines of every PyTorch step. What must be empty before them?",
    cases=(
        Case("the better token becomes likelier", *_TWO, _log([0.5], [0.5])),
        Case("gradients of an earlier step do not count", [0.0, 0.0], [1.0, 0.0], *_TWO[2:], _log([0.5], [0.5])),
        Case("a row of rewards is the completions of one prompt, which stand next to each other", *_TWO[:2],
             [[0], [1], [0], [0]], [[True]] * 4, [[10.0, 0.0], [70.0, 30.0]], _log(*[[0.5]] * 4)),
        Case("padding does not count, and each completion counts the same", [0.5, 0.0], _TWO[1],
             [[0, 1], [1, 1]], _SHORT_LONG, [[10.0, 0.0]], _log([0.6225, 0.3775], [0.3775, 0.3775])),
        Case("the ratio compares with the policy that sampled", [0.5, 0.0], *_TWO[1:], _log([0.6], [0.4])),
        Case("what has moved far enough is clipped, and nothing else", [1.0, 0.0], _TWO[1],
             [[0], [0], [1], [1]], [[True]] * 4, [[10.0, 0.0, 0.0, 10.0]], _log([0.604], [0.4], [0.34], [0.6])),
        Case("the KL pulls towards the reference, even where all rewards are equal", *_TWO[:4], [[1.0, 1.0]],
             _log([0.5], [0.5]), ref_logprobs=_log([0.9], [0.1]), kl_coef=0.5),
    ),
    diagnoses={
        "advantages are [P, K], the loss wants [B]: flatten": _step(rank=_adv, loss=_loss(gain=_clip(_least))),
        "the weights do not move: no step after backward, or a ratio without gradient": _step("backward"),
        "the weights do not move: your ratio has no gradient": _step(loss=_loss(
            gain=lambda lp, old, *a, **s: _gain(lp - lp, old - old, *a, **s)
        )),
        "the gradients of an earlier step are still there": _step("backward step"),
        "you make two steps": _step("zero_grad backward step step"),
        "you update twice": _step(times=2),
        "your step drops the KL: hand ref_logprobs and kl_coef on to grpo_loss": _step(penalty=False),
        "you score with probabilities, not with their logarithms": _step(score=lambda *a: _lp(*a).exp()),
        "you use the rewards as they are, not compared within the group": _step(rank=lambda r: r.flatten()),
        "you compare with all completions, not within the group": _step(rank=lambda r: _flat(r.view(1, -1))),
        "you do not divide the advantages by the std of the group": _step(
            rank=lambda r: _adv(r, scale="none").flatten()
        ),
        "your advantages are in another order than the completions": _step(rank=lambda r: _adv(r).T.flatten()),
        "your ratio is always 1: it must compare with old_logprobs": _step(old_of=lambda lp, old: lp.detach()),
        **{sentence: _step(loss=wrong) for sentence, wrong in grpo_loss.diagnoses.items() if "KL" not in sentence},
    },
)  # fmt: skip
