"""Judges for what a learner writes: right, or which mistake is it?

A judge asks a function small questions, from the simplest to the trickiest, and compares value, shape, type
and gradient. If one is wrong, it asks the classic wrong versions the same questions: the one that answers as
the learner did is the likely mistake. A judge never raises and draws no random numbers; it returns a Verdict.
A setting such as `temperature` is tried only if the function takes it. A function that hangs is waited for.

>>> group_advantages
group_advantages(rewards[P, K]) -> [P, K]; the std divides by K - 1, std_eps = 1e-4 is added to it
>>> group_advantages(lambda rewards: rewards - rewards.mean(1, keepdim=True))
[not yet] group_advantages: you subtract the mean, but divide by nothing.
    rewards   [[1, 0, 0, 1]]
    expected  [[0.8659, -0.8659, -0.8659, 0.8659]]    got  [[0.5, -0.5, -0.5, 0.5]]
    hint      Each row is a world of its own: take its mean away, then measure what is left in units of its own spread.
"""

import html
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_lab import advantages, kl, logprobs, losses, rewards

COLOURS = {"ok": "#0072b2", "not yet": "#d55e00", "to do": "#767676"}  # Okabe and Ito's; the words say it too
UNWRITTEN = "not written yet."
AS_GOOD = (torch.float32, torch.float64, torch.bool)  # where float32 is expected; half precision has three digits


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a judge says; truthy when all is right. It shows itself as text, and in a notebook as HTML."""

    judge: str
    state: str
    """One of "ok", "not yet", "to do"."""
    message: str
    hint: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    """The smallest failing input, by name."""
    compared: dict[str, str] = field(default_factory=dict)
    """What was expected and what came."""

    def __bool__(self) -> bool:
        return self.state == "ok"

    def __repr__(self) -> str:
        rows = self.inputs | self.compared | {"hint": self.hint}
        width = max(map(len, rows))
        lines = [f"    {name:{width}}  {text}" for name, text in rows.items() if text]
        n, pair = len(self.inputs), list(self.compared.items())
        beside = "    ".join([*lines[n : n + 1], *(f"{name}  {text}" for name, text in pair[1:])])
        if pair and len(beside) <= 110:
            lines[n : n + len(pair)] = [beside]
        return "\n".join([f"[{self.state}] {self.judge}: {self.message}", *lines])

    def _repr_html_(self) -> str:
        def cells(tag: str, texts: Iterable[str]) -> str:
            return "".join(f"<{tag}>{html.escape(text)}</{tag[:2]}>" for text in texts)

        inputs = "".join(f"<tr>{cells('th scope=row', [k])}{cells('td', [v])}</tr>" for k, v in self.inputs.items())
        pair = f"<tr>{cells('th scope=col', self.compared)}</tr><tr>{cells('td', self.compared.values())}</tr>"
        tables = f"<table>{inputs}</table><table>{pair}</table>" if self.compared else ""
        title = f"<strong>[{self.state}] {html.escape(self.judge)}</strong>: {html.escape(self.message)}"
        style = f"border-left:4px solid {COLOURS[self.state]};padding:4px 10px"
        return f'<div role="status" style="{style}">{title}{tables}<div>{html.escape(self.hint)}</div></div>'


class Case:
    """One question: what must hold, the arguments in order (lists become tensors, tuples lists), and settings."""

    def __init__(self, says: str, *inputs, atol: float = 1e-5, **settings):
        self.says, self.inputs, self.atol, self.settings = says, inputs, atol, settings


class Answer(NamedTuple):
    """What a function made of a case."""

    value: Tensor | None = None
    gradient: Tensor | None = None
    problem: str = ""
    """Why there is no value."""


@dataclass(frozen=True, repr=False)
class Judge:
    """Call it with the learner's function; printed, it says what it expects."""

    contract: str
    """The signature, and what matters beside it."""
    reference: Callable
    cases: tuple[Case, ...]
    """From the simplest to the trickiest."""
    diagnoses: dict[str, Callable]
    """What to say -> the wrong version that deserves it."""
    hint: str
    gradient: bool = False
    """Must a gradient reach the first argument?"""
    adapt: Callable = lambda fn: fn
    """Makes of a function, the learner's too, one that takes a case's arguments and returns a tensor."""

    def __repr__(self) -> str:
        return self.contract

    def __call__(self, fn: Callable) -> Verdict:
        """Ok, not yet or to do? Never raises."""
        name = self.contract.partition("(")[0]
        if not callable(fn):
            what = f"hand over the function itself, without calling it; this is of type {type(fn).__name__}."
            return Verdict(name, "not yet", what, self.contract)
        known = {setting for case in self.cases for setting in case.settings}
        skipped = sorted(known - _keywords(fn, dict.fromkeys(known), {}).keys())
        cases = [case for case in self.cases if not case.settings.keys() & skipped]
        if not cases:
            return Verdict(name, "not yet", f"your function takes no {' and no '.join(skipped)}.", self.contract)

        for case in cases:
            right, got = self._ask(self.reference, case), self._ask(fn, case)
            if got.problem == UNWRITTEN and case is cases[0]:
                return Verdict(name, "to do", UNWRITTEN, self.contract)
            wrong = _difference(right, got, case)
            if wrong:
                likely = self._diagnose(fn, cases, case) if got.value is not None else None
                names = inspect.signature(self.adapt(self.reference)).parameters
                values = dict(zip(names, case.inputs, strict=False)) | case.settings
                shown = {n: _show(_fresh(value)) for n, value in values.items()}
                return Verdict(name, "not yet", likely or wrong, self.hint, shown, _compared(right, got, case))
        without = f" (without {', '.join(skipped)})" if skipped else ""
        return Verdict(name, "ok", f"all {len(cases)} cases are right{without}.")

    def _ask(self, fn: Callable, case: Case) -> Answer:
        inputs = [_fresh(value) for value in case.inputs]
        known = inspect.signature(self.reference).parameters
        settings = {k: _fresh(v) for k, v in _keywords(fn, case.settings, known).items()}
        leaf = inputs[0]
        try:
            with torch.enable_grad():
                if self.gradient:
                    inputs[0] = leaf.requires_grad_().clone()  # a leaf itself cannot be changed in place
                before = _show([inputs, *settings.values()], 17)
                value = self.adapt(fn)(*inputs, **settings)
                if value is None or value is ...:
                    return Answer(problem=UNWRITTEN)
                value = _tensor(value)
                if _show([inputs, *settings.values()], 17) != before:
                    return Answer(problem="you change an input in place: make a new tensor instead.")
                if not self.gradient:
                    return Answer(value.detach().cpu())
                # an answer that does not depend on the input may well be a plain number: its gradient is 0
                slope = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
                return Answer(value.detach().cpu(), torch.zeros_like(leaf) if slope is None else slope)
        except _UnreadableError as error:
            return Answer(problem=f"your answer must be {error}.")
        except Exception as error:  # a wrong answer is feedback, not a crash
            text = " ".join(str(error).split())[:300]
            # PyTorch raises this too, where an operation lacks a type: "... not implemented for 'Bool'"
            if isinstance(error, NotImplementedError) and "implemented for" not in text:
                return Answer(problem=UNWRITTEN)
            return Answer(problem=f"your function raises {type(error).__name__}" + (f": {text}" if text else "."))

    def _diagnose(self, fn: Callable, cases: list[Case], failing: Case) -> str | None:
        # A wrong version explains the failure if it answers as the learner does there, and nothing refutes it: nowhere
        # else is it wrong and the learner right. Of several, the one that agrees with the learner most often is named.
        best, most = None, 0
        asked = [(case, self._ask(self.reference, case), self._ask(fn, case)) for case in cases]
        for sentence, version in self.diagnoses.items():
            if not _same(self._ask(version, failing), asked[cases.index(failing)][2], failing):
                continue
            wrong = [self._ask(version, case) for case in cases]
            agrees = sum(_same(w, got, case) for w, (case, _, got) in zip(wrong, asked, strict=True))
            refuted = any(
                same(got, right, case) and not same(w, right, case) and not w.problem
                for w, (case, right, got) in zip(wrong, asked, strict=True)
                for same in (_same, _same_value)
            )
            if agrees > most and not refuted:
                best, most = sentence if agrees == len(cases) else f"perhaps {sentence}", agrees
        return best and f"{best}."


def _keywords(fn: Callable, settings: dict, known: Mapping[str, inspect.Parameter]) -> dict:
    # the settings that a function takes, and what else it insists on: for that there are the known defaults
    try:
        taken = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return settings
    insisted = [k for k, p in taken.items() if p.default is p.empty and k in known and known[k].default is not p.empty]
    return {k: known[k].default for k in insisted} | {k: v for k, v in settings.items() if k in taken}


def _difference(right: Answer, got: Answer, case: Case) -> str:
    # the first thing that is wrong, "" if nothing is
    value, expected = got.value, right.value
    if got.problem:
        return got.problem if got.problem != UNWRITTEN else f"nothing comes back here. What must hold: {case.says}."
    if value.shape != expected.shape:
        return f"your answer has the shape {list(value.shape)}, expected {list(expected.shape)}."
    types = AS_GOOD if expected.is_floating_point() else (torch.bool,)
    if value.dtype not in types:
        return f"your answer has the type {value.dtype}, expected {types[0]}."
    if not _close(value, expected, case):
        finite = "" if value.isfinite().all() else "your answer is not finite. "
        return f"{finite}What must hold: {case.says}."
    if _same(right, got, case):
        return ""
    if not got.gradient.any():
        return "the value is right, but no gradient reaches the first argument: it was detached, or made a number."
    return f"the value is right, but its gradient is not. What must hold: {case.says}."


def _compared(right: Answer, got: Answer, case: Case) -> dict[str, str]:
    if got.value is None:
        return {"expected": _show(right.value)}
    slope = right.gradient is not None and _close(right.value, got.value, case)
    pair, of = ((right.gradient, got.gradient), " gradient") if slope else ((right.value, got.value), "")
    digits = next((d for d in (4, 6) if _show(pair[0], d) != _show(pair[1], d)), 9)
    return {f"expected{of}": _show(pair[0], digits), f"got{of}": _show(pair[1], digits)}


def _close(a: Tensor, b: Tensor, case: Case) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=case.atol, equal_nan=True)


def _same_value(a: Answer, b: Answer, case: Case) -> bool:
    return a.problem == b.problem and (a.value is None or _close(a.value, b.value, case))


def _same(a: Answer, b: Answer, case: Case) -> bool:
    return _same_value(a, b, case) and (a.gradient is None or _close(a.gradient, b.gradient, case))


class _UnreadableError(Exception):
    pass


def _tensor(value) -> Tensor:
    # lists of numbers or of tensors are as good as tensors; a number that Python made is a float
    value = getattr(value, "loss", value)
    if isinstance(value, Tensor):
        return value.to_dense()
    try:
        if isinstance(value, list | tuple) and any(isinstance(v, list | tuple | Tensor) for v in value):
            return torch.stack([_tensor(v) for v in value])
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise _UnreadableError(f"a tensor or lists of numbers, not {_show(value)[:80]}") from None
    return tensor if tensor.dtype == torch.bool else tensor.double()


def _fresh(value):
    if isinstance(value, Tensor):
        return value.clone()
    return torch.tensor(value) if isinstance(value, list) else list(value) if isinstance(value, tuple) else value


def _show(value, digits: int = 4) -> str:
    value = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(v, digits) for v in value) + "]"
    return f"{value + 0.0:.{digits}g}" if isinstance(value, float) else repr(value)


# --- The judges. Behind each sentence stands the wrong version that deserves it.

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
        Case("the mean of a group becomes 0, its spread 1", [[1.0, 0.0, 0.0, 1.0]], atol=3e-4),  # std_eps comes later
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
        "you compare down the columns, but a group is a row": lambda r: (r - r.mean(0)) / (r.std(0, False) + 1e-4),
        "you compare with the others only, not with the whole group": lambda r: _adv(r, baseline="leave-one-out"),
        "you divide 0 by 0: nothing keeps the division finite": _group(lambda r, m, s: (r - m) / s),
        "your std_eps is inside the root": _group(lambda r, m, s: (r - m) / (s**2 + 1e-4).sqrt()),
        "your std_eps is so small that rounding becomes an advantage": _group(lambda r, m, s: (r - m) / (s + 1e-8)),
    },
)


def _clip(formula: Callable, masked: Callable = lambda gain, mask: gain.where(mask, 0.0), early=True) -> Callable:
    # formula: of the unclipped gain, the clipped one, the ratio, the advantages and eps
    def gain(lp, old, adv, mask, clip_range=0.2):
        c, A = (lp - old).where(mask | (not early), 0.0).exp(), adv[:, None]
        return masked(formula(c * A, c.clamp(1 - clip_range, 1 + clip_range) * A, c, A, clip_range), mask)

    return gain


def _least(u, v, *_) -> Tensor:
    return torch.minimum(u, v)


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
        objective = gain(lp, old, adv, mask, **_keywords(gain, {"clip_range": clip_range}, {}))
        if kl_coef:
            objective = objective - beta(kl_coef) * kl_of(lp, ref_logprobs, mask)
        return sign * mean(objective, mask)

    return loss


_NEW, _OLD, _FAR = _log([0.5, 0.3], [0.4, 0.5]), _log([0.25, 0.5], [0.5, 0.5]), _log([0.25, 0.25], [0.25, 0.25])
_TWO_ROWS, _EMPTY, _OFF = _log([0.5], [0.5]), [[True], [False]], {"ref_logprobs": _QUARTER, "kl_coef": 0.0}
grpo_loss = Judge(
    contract="grpo_loss(logprobs[B, T], old_logprobs[B, T], advantages[B], mask[B, T], *, ref_logprobs, kl_coef,"
    " clip_range=0.2) -> scalar to be minimised (or an object whose .loss it is)",
    reference=losses.grpo_loss,
    gradient=True,
    hint="You have the pieces: token by token the gain minus kl_coef times KL, then one mean, then the sign.",
    cases=(
        *(Case(c.says, *c.inputs, **c.settings | _OFF) for c in clipped_surrogate.cases[:6]),
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
        "your KL is that to the old policy": lambda p, q, *a, ref_logprobs, **s: _loss()(p, q, *a, ref_logprobs=q, **s),
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
        answer, vocabulary = _tensor(answer), torch.arange(logits.shape[-1])
        if answer.dtype == torch.bool:
            return answer
        for t in (1.0, settings.get("temperature", 1.0)):
            kept = answer > -torch.inf
            if answer.shape == logits.shape and torch.allclose(answer[kept].double(), (logits / t)[kept].double()):
                return kept
        counts = (answer.unsqueeze(-1) == vocabulary).sum(-2) if answer.ndim else answer
        known = (answer == -1) | (answer.unsqueeze(-1) == vocabulary).any(-1)
        if counts.shape != logits.shape or counts.max() > 1 or not known.all():
            raise _UnreadableError(f"ids (-1 for padding), a mask, or logits with -inf where cut, not {_show(answer)}")
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


def _countdown(numbers=lambda used, given: used == given, value=lambda got, target: got == target) -> Callable:
    def one(prompt, completion):
        given, target = prompt.rstrip("=").split(":")
        given, got = sorted(map(int, given.split(","))), rewards.evaluate_expression(completion)
        return float(got is not None and value(got[0], int(target)) and numbers(got[1], given))

    return lambda prompts, completions: list(map(one, prompts, completions))


reward = Judge(
    contract='reward(prompts, completions) -> list of 1.0 or 0.0; for the prompt "3,5,7:22=" "3*5+7" is right',
    reference=rewards.countdown,
    hint="Two questions, both must be yes: which numbers were used, and what do they come to? Anything odd earns 0.",
    cases=(
        Case("an expression that uses each number once and hits the target earns 1", ("3,5,7:22=",), ("3*5+7",)),
        Case("another value than the target earns 0", ("3,5,7:22=",), ("3*5-7",)),
        Case("the order is free, and brackets are allowed", ("1,2,3:9=",), ("3*(2+1)",)),
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


def _weights_after(fn: Callable) -> Callable:
    def play(weights, gradient, tokens, mask, rewards, old_logprobs, **s):
        model = _Policy(weights)
        model.weights.grad = gradient.clone()
        result = fn(model, torch.optim.SGD([model.weights], lr=1.0), tokens, mask, rewards, old_logprobs, **s)
        return result if model.calls == 0 and (result is None or result is ...) else model.weights.detach()

    return play


def _step(order="zero_grad backward step", rank=_adv, loss=_loss(), old_of=lambda lp, old: old) -> Callable:  # noqa: B008
    def step(model, optimizer, tokens, mask, rewards, old_logprobs):
        lp = _lp(model(tokens), tokens)
        value = loss(lp, old_of(lp, old_logprobs), rank(rewards).flatten(), mask)
        for do in order.split():
            value.backward() if do == "backward" else getattr(optimizer, do)()

    return step


_TWO = [0.0, 0.0], [0.0, 0.0], [[0], [1]], [[True]] * 2, [[10.0, 0.0]]
training_step = Judge(
    contract="training_step(model, optimizer, tokens[B, T], mask[B, T], rewards[P, K], old_logprobs[B, T]): one update,"
    " clip_range 0.2, no KL; model(tokens) -> logits [B, T, V], position t predicts tokens[:, t]; return what you like",
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
    ),
    diagnoses={
        "the weights do not move: no step after backward, or a ratio without gradient": _step("backward"),
        "the gradients of an earlier step are still there": _step("backward step"),
        "you make two steps": _step("zero_grad backward step step"),
        "you use the rewards as they are, not compared within the group": _step(rank=lambda r: r),
        "you compare with all completions, not within the group": _step(rank=lambda r: _adv(r.view(1, -1))),
        "you do not divide the advantages by the std of the group": _step(rank=lambda r: _adv(r, scale="none")),
        "your advantages are in another order than the completions": _step(rank=lambda r: _adv(r).T),
        "your ratio is always 1: it must compare with old_logprobs": _step(old_of=lambda lp, old: lp.detach()),
        **{sentence: _step(loss=wrong) for sentence, wrong in grpo_loss.diagnoses.items() if "KL" not in sentence},
    },
)  # fmt: skip
