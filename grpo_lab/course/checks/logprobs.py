"""The judge of token log-probabilities (notebook 02)."""

import math
from collections.abc import Callable

import torch

from grpo_lab.algorithm.logprobs import token_logprobs as _lp
from grpo_lab.course.checks.judge import Case, Judge


def _scored(formula: Callable) -> Callable:
    # formula(logits, tokens), with the settings applied correctly
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
        Case("a very unlikely token has a finite log-probability", [[[0.0, 200.0]]], [[0]]),
        Case("large logits must not overflow", [[[1000.0, 1001.0]]], [[0]]),
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
