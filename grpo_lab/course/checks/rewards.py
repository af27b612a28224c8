"""The judge of the Countdown reward (notebook 03)."""

from collections.abc import Callable

from grpo_lab.course.checks.judge import Case, Judge
from grpo_lab.rewards import verifiable as rewards


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
    hint="Check two things: which numbers were used, and what is the value? Anything unexpected earns 0.",
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
        Case("a fraction as an intermediate result is allowed", ("3,6,8:4=",), ("8/6*3",)),
        Case("a text that is not an expression earns 0", ("3,5,7:22=",) * 3, ("", "3*5+", "I think 3*5+7")),
        Case("other text after the expression earns 0", ("3,5,7:22=",), ("3*5+7=22",)),
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
        "you compare sets, which ignore how often a number is used": _countdown(
            numbers=lambda used, given: set(used) == set(given)
        ),
        "you let numbers be left out": _countdown(numbers=lambda used, given: set(used) <= set(given)),
        "you let numbers be used that were not given": _countdown(numbers=lambda used, given: set(used) >= set(given)),
        "you compare with the prompt's numbers unsorted; evaluate_expression sorts those used": _countdown(order=list),
        "you take the value 0 for no value": _countdown(value=lambda got, target: got and got == target),
        "you forget the sign": _countdown(value=lambda got, target: abs(got) == target),
        "evaluate_expression returns None if the text is not an expression": _countdown(
            none=lambda got: got[0] is None
        ),
        "evaluate_expression returns None, not a pair, if the text is not an expression": _countdown(none=_unpacked),
        "you cut off fractions": _countdown(value=lambda got, target: int(got) == target),
        "you judge all completions by the first prompt": lambda p, c: _countdown()(p[:1] * len(c), c),
    },
)
