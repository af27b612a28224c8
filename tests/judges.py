"""Tests that every judge must pass, given what learners hand in."""

import inspect
import math
import re
import time
from collections.abc import Callable

import torch

from grpo_lab.course.checks import Judge, Verdict


def learner(source: str) -> Callable:
    """Return the function that a text defines."""
    names = {"torch": torch, "math": math, "re": re}
    exec(source, names)
    return next(value for value in names.values() if inspect.isfunction(value))


def seconds_of(judge: Judge, fn: Callable) -> tuple[Verdict, float]:
    """Return the verdict, and the CPU time that it took."""
    torch.optim.SGD([torch.zeros(1)], lr=1.0).step()  # the first one imports PyTorch's compiler
    began = time.process_time()
    return judge(fn), time.process_time() - began


class JudgeTests:
    """A subclass names a judge and the answers of learners; it inherits the tests."""

    judge: Judge
    solution: str
    """A right answer, as source code."""
    mutants: dict[str, dict[str, str]]
    """A piece of the solution -> {its replacement: how the message must begin; "" if any message will do}."""
    right: list[Callable]
    """Right answers in other styles."""

    def pytest_generate_tests(self, metafunc):
        if "old" in metafunc.fixturenames:
            cases = [(old, new, words) for old, wrong in self.mutants.items() for new, words in wrong.items()]
            metafunc.parametrize(("old", "new", "sentence"), cases, ids=[words or new for _, new, words in cases])

    def test_there_are_enough_wrong_answers(self):
        assert sum(map(len, self.mutants.values())) >= 8

    def test_the_right_answers_pass(self):
        for fn in [learner(self.solution), self.judge.reference, *self.right]:
            verdict, seconds = seconds_of(self.judge, fn)
            assert verdict, (fn, verdict)
            assert repr(verdict).startswith(f"[ok] {repr(self.judge).partition('(')[0]}: all ")
            assert seconds < 1

    def test_the_wrong_answers_fail_and_hear_why(self, old, new, sentence):
        assert old in self.solution
        verdict, seconds = seconds_of(self.judge, learner(self.solution.replace(old, new)))
        assert not verdict
        assert verdict.state == "not yet"
        assert verdict.message.startswith(sentence), verdict
        assert verdict.message.endswith(".") or "raises" in verdict.message
        assert verdict.hint
        assert seconds < 1
