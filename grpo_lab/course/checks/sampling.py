"""The judges of the completion mask and of truncation (notebook 02)."""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_lab.algorithm.logprobs import truncate as _top
from grpo_lab.course.checks.inputs import log_of
from grpo_lab.course.checks.judge import Case, Judge, UnreadableError, read, show


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
        Case("each row has its own end", [[5, 6, 1, 0], [1, 5, 6, 7], [5, 6, 7, 8]], (1,)),
    ),
    diagnoses={
        "you drop the end token, but it was sampled and must be learned": lambda x, e: _ends(x, e).cumsum(1) == 0,
        "you hide the end tokens, but not what follows": lambda x, e: ~_ends(x, e),
        "your mask is inverted: True means that a token counts": lambda x, e: ~_until_end(x, e),
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


def _kept(fn: Callable) -> Callable:
    # convert ids padded with -1, a mask, logits with -inf, or None ("nothing is cut") to a mask over the vocabulary
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
    # keep(p, total, top_p): p sorted from the largest, total its cumulative sum
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


_FOUR = log_of([0.15, 0.5, 0.05, 0.3])
truncate = Judge(
    contract="truncate(logits[..., V], *, temperature=1.0, top_k=0, top_p=1.0) -> the ids kept [..., k], -1 for padding"
    " (or a mask [..., V], or the logits with -inf where cut)",
    reference=_top,
    adapt=_kept,
    hint="Sort, sum from the largest, find the probability before each token, and restore the order.",
    cases=(
        Case("top_k = 1 keeps the likeliest token", [[0.0, 2.0, 1.0]], top_k=1),
        Case("top_k = 2 keeps the two likeliest, wherever they stand", _FOUR, top_k=2),
        Case("top_k = 0 keeps all", [[0.0, 2.0, 1.0]], top_k=0),
        Case("top_k larger than the vocabulary keeps all", [[0.0, 2.0, 1.0]], top_k=4),
        Case("the likeliest token, with 1/2, reaches top_p = 0.4 alone", _FOUR, top_p=0.4),
        Case("1/2 does not reach top_p = 0.7: the token that reaches it is kept too", _FOUR, top_p=0.7),
        Case("the likeliest token is kept however small top_p is", _FOUR, top_p=0.01),
        Case("top_p = 1 keeps all", _FOUR, top_p=1.0),
        Case("each row is cut on its own", log_of([0.05, 0.15, 0.8], [0.3, 0.31, 0.39]), top_p=0.75),
        Case("after top_k the probabilities sum to 1 again: 0.5 of 0.8 reaches top_p = 0.6", _FOUR, top_k=2, top_p=0.6),
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
