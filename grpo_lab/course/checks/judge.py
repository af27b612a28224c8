"""The engine of the judges: call a learner's function on small cases and name what is wrong with it."""

import html
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

COLOURS = {"ok": "#0072b2", "not yet": "#d55e00", "to do": "#767676"}  # Okabe and Ito's; the words say it too
UNWRITTEN, RAISES = "not written yet.", "your function raises"
AS_GOOD = (torch.float32, torch.float64, torch.bool)  # where float32 is expected; half precision has three digits


@dataclass(frozen=True, repr=False)
class Verdict:
    """The result of a judge: truthy if everything is right, shown as text, and as HTML in a notebook."""

    judge: str
    state: str
    """One of "ok", "not yet", "to do"."""
    message: str
    hint: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    """The smallest failing input, by name."""
    compared: dict[str, str] = field(default_factory=dict)
    """The expected and the actual result."""

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
            style = "text-align:left;font-family:monospace;padding:1px 1.5em 1px 0"  # as in the text: columns line up
            return "".join(f'<{tag} style="{style}">{html.escape(text)}</{tag[:2]}>' for text in texts)

        inputs = "".join(f"<tr>{cells('th scope=row', [k])}{cells('td', [v])}</tr>" for k, v in self.inputs.items())
        pair = f"<tr>{cells('th scope=col', self.compared)}</tr><tr>{cells('td', self.compared.values())}</tr>"
        tables = f"<table>{inputs}</table><table>{pair}</table>" if self.compared else ""
        title = f"<strong>[{self.state}] {html.escape(self.judge)}</strong>: {html.escape(self.message)}"
        style = f"border-left:4px solid {COLOURS[self.state]};padding:4px 10px"
        return f'<div role="status" style="{style}">{title}{tables}<div>{html.escape(self.hint)}</div></div>'


class Case:
    """One test case: what must hold, the positional arguments (lists become tensors, tuples lists), and settings.

    stumbles: the message if the function raises here, for an error that is expected.
    """

    def __init__(self, says: str, *inputs, atol: float = 1e-5, stumbles: str = "", **settings):
        self.says, self.inputs, self.atol, self.stumbles, self.settings = says, inputs, atol, stumbles, settings


class Answer(NamedTuple):
    """What a function returned for a case."""

    value: Tensor | None = None
    gradient: Tensor | None = None
    problem: str = ""
    """Why there is no value."""


@dataclass(frozen=True, repr=False)
class Judge:
    """Checks a function when called with it; its repr is the contract."""

    contract: str
    """The signature, and what else the function must do."""
    reference: Callable
    cases: tuple[Case, ...]
    """From the simplest to the trickiest."""
    diagnoses: dict[str, Callable]
    """Message -> the wrong version that it describes."""
    hint: str
    gradient: bool = False
    """Whether the gradient with respect to the first argument is compared too."""
    adapt: Callable = lambda fn: fn
    """Wraps a function so that it takes a case's arguments and returns a tensor."""

    def __repr__(self) -> str:
        return self.contract

    def __call__(self, fn: Callable) -> Verdict:
        """Return the verdict on the function. Never raises."""
        name = self.contract.partition("(")[0]
        if not callable(fn):
            what = f"pass the function itself, without calling it; got {type(fn).__name__}."
            return Verdict(name, "not yet", what, self.contract)
        known = {setting for case in self.cases for setting in case.settings}
        skipped = sorted(known - keywords(fn, dict.fromkeys(known), {}).keys())
        cases = [case for case in self.cases if not case.settings.keys() & skipped]
        if not cases:
            return Verdict(name, "not yet", f"your function takes no {' and no '.join(skipped)}.", self.contract)

        for case in cases:
            right, got = self._ask(self.reference, case), self._ask(fn, case)
            if got.problem == UNWRITTEN and case is cases[0]:
                return Verdict(name, "to do", UNWRITTEN, self.contract)
            wrong = _difference(right, got, case)
            if wrong:
                # where only the dtype is wrong, the message says all
                odd = RAISES in got.problem if got.value is None else not _same(right, got, case)
                likely = self._diagnose(fn, cases, case) if odd else None
                names = inspect.signature(self.adapt(self.reference)).parameters
                values = dict(zip(names, case.inputs, strict=False)) | case.settings
                shown = {n: show(_fresh(value)) for n, value in values.items()}
                return Verdict(name, "not yet", likely or wrong, self.hint, shown, _compared(right, got, case, likely))
        without = f" (without {', '.join(skipped)})" if skipped else ""
        return Verdict(name, "ok", f"all {len(cases)} cases are right{without}.")

    def _ask(self, fn: Callable, case: Case) -> Answer:
        inputs = [_fresh(value) for value in case.inputs]
        known = inspect.signature(self.reference).parameters
        settings = {k: _fresh(v) for k, v in keywords(fn, case.settings, known).items()}
        leaf = inputs[0]
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what PyTorch warns about (a std of one number) shows in the value
                if self.gradient:
                    inputs[0] = leaf.requires_grad_().clone()  # a leaf itself cannot be changed in place
                before = show([inputs, *settings.values()], 17)
                value = self.adapt(fn)(*inputs, **settings)
                if value is None or value is ...:
                    return Answer(problem=UNWRITTEN)
                value = read(value)
                if show([inputs, *settings.values()], 17) != before:
                    return Answer(problem="you change an input in place: make a new tensor instead.")
                if not self.gradient:
                    return Answer(value.detach().cpu())
                # a result that does not depend on the input may be a plain number: its gradient is 0
                slope = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
                return Answer(value.detach().cpu(), torch.zeros_like(leaf) if slope is None else slope)
        except UnreadableError as error:
            return Answer(problem=f"your answer must be {error}.")
        except Exception as error:  # a wrong answer is feedback, not a crash
            text = " ".join(str(error).split())[:300]
            # PyTorch raises this too, for a dtype that an operation does not support: "... not implemented for 'Bool'"
            if isinstance(error, NotImplementedError) and "implemented for" not in text:
                return Answer(problem=UNWRITTEN)
            return Answer(problem=f"{RAISES} {type(error).__name__}" + (f": {text}" if text else "."))

    def _diagnose(self, fn: Callable, cases: list[Case], failing: Case) -> str | None:
        # A wrong version explains the failure if it returns what the learner's function returns in the failing case,
        # and is never wrong where the learner is right. Of several, the one that agrees in most cases is named.
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


def keywords(fn: Callable, settings: dict, known: Mapping[str, inspect.Parameter]) -> dict:
    """Return the settings that a function takes, and the defaults of any other known arguments that it requires."""
    try:
        taken = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return settings
    insisted = [k for k, p in taken.items() if p.default is p.empty and k in known and known[k].default is not p.empty]
    return {k: known[k].default for k in insisted} | {k: v for k, v in settings.items() if k in taken}


def _difference(right: Answer, got: Answer, case: Case) -> str:
    # return the first thing that is wrong, or ""
    value, expected = got.value, right.value
    if got.problem.startswith(RAISES) and case.stumbles:
        return f"{case.stumbles}."
    if got.problem:
        return (
            got.problem
            if got.problem != UNWRITTEN
            else f"your function returns nothing here. What must hold: {case.says}."
        )
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
        return (
            "the value is right, but no gradient reaches the first argument: it was detached or turned into a number."
        )
    return f"the value is right, but its gradient is not. What must hold: {case.says}."


def _compared(right: Answer, got: Answer, case: Case, likely: str | None) -> dict[str, str]:
    if got.value is None:  # the problem is the message already, unless its cause was found
        return {"expected": show(right.value)} | ({"got": got.problem.removeprefix("your function ")} if likely else {})
    slope = right.gradient is not None and _close(right.value, got.value, case)
    pair, of = ((right.gradient, got.gradient), " gradient") if slope else ((right.value, got.value), "")
    digits = next((d for d in (4, 6) if show(pair[0], d) != show(pair[1], d)), 9)
    return {f"expected{of}": show(pair[0], digits), f"got{of}": show(pair[1], digits)}


def _close(a: Tensor, b: Tensor, case: Case) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=case.atol, equal_nan=True)


def _same_value(a: Answer, b: Answer, case: Case) -> bool:
    return a.problem == b.problem and (a.value is None or _close(a.value, b.value, case))


def _same(a: Answer, b: Answer, case: Case) -> bool:
    return _same_value(a, b, case) and (a.gradient is None or _close(a.gradient, b.gradient, case))


class UnreadableError(Exception):
    """The result cannot be converted to a tensor; the text says what is expected."""


def read(value) -> Tensor:
    """Convert a result to a tensor: lists of numbers or of tensors are allowed; Python numbers become float64."""
    value = getattr(value, "loss", value)
    if isinstance(value, Tensor):
        return value.to_dense()
    try:
        if isinstance(value, list | tuple) and any(isinstance(v, list | tuple | Tensor) for v in value):
            return torch.stack([read(v) for v in value])
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise UnreadableError(f"a tensor or lists of numbers, not {show(value)[:80]}") from None
    return tensor if tensor.dtype == torch.bool else tensor.double()


def _fresh(value):
    if isinstance(value, Tensor):
        return value.clone()
    return torch.tensor(value) if isinstance(value, list) else list(value) if isinstance(value, tuple) else value


def show(value, digits: int = 4) -> str:
    """Return tensors and nested lists as one line of text."""
    value = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(v, digits) for v in value) + "]"
    return f"{value + 0.0:.{digits}g}" if isinstance(value, float) else repr(value)
