"""Verifiable rewards: a number from a completion and the answer. No model, no network; nothing is ever `eval`ed.

Every reward function has the signature `f(prompts, completions, **columns) -> list[float | None]`, where the columns
are the dataset's other columns, and None means that the completion is not scored.
A completion is untrusted input: parsing has limits, and text that does not parse scores 0.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction

import regex

from grpo_lab.rewards.isolated import math_answer

RewardFunction = Callable[..., Sequence[float | None]]

MAX_EXPRESSION = 100  # characters; a longer text is not parsed
MAX_TEXT = 100_000  # characters that are searched for an answer, counted from the end
MAX_SECONDS = 0.5  # for one match of a user's pattern


def countdown(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """Return 1 if the completion is an expression that uses each number of the prompt once and hits its target, else 0.

    >>> countdown(["3,5,7:22="] * 4, ["3*5+7", "7+5*3", "3*5", "22"])
    [1.0, 1.0, 0.0, 0.0]
    """
    return [float(solves(prompt, completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def solves(prompt: str, expression: str) -> bool:
    """Return whether the expression uses each number of a prompt such as "3,5,7:22=" once and hits its target."""
    match = re.fullmatch(r"(\d{1,9}(?:,\d{1,9})*):(\d{1,9})=", prompt.strip())
    if match is None:
        raise ValueError(f'a Countdown prompt looks like "3,5,7:22=", got {prompt[:60]!r}')
    result = evaluate_expression(expression)
    return result is not None and result == (int(match[2]), sorted(map(int, match[1].split(","))))


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of an expression in + - * / ( ), and the numbers it uses in ascending order.

    Returns: None for any other text: other characters, powers, signs before a number, division by zero,
        more than MAX_EXPRESSION characters or numbers of more than nine digits.

    >>> evaluate_expression("(7-5)/3")
    (Fraction(2, 3), [3, 5, 7])
    >>> evaluate_expression("9**9**9"), evaluate_expression("__import__('os')")
    (None, None)
    """
    text = text.strip()
    if len(text) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", text) or re.search(r"\d{10}", text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        numbers: list[int] = []
        return _value(tree, numbers), sorted(numbers)
    except (SyntaxError, ZeroDivisionError, _NotArithmeticError):
        return None


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class _NotArithmeticError(Exception):
    pass


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        numbers.append(node.value)
        return Fraction(node.value)
    raise _NotArithmeticError


def exact_answer(prompts: Sequence, completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """Return 1 if the completion equals the answer, apart from spaces at the ends, else 0.

    >>> exact_answer(["2+2="] * 2, [" 4", "5"], answer=["4", "4"])
    [1.0, 0.0]
    """
    return [float(c.strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def numeric_answer(prompts: Sequence, completions: Sequence[str], answer: Sequence, **columns) -> list[float]:
    """Return 1 if the completion's final number equals the answer's, else 0.

    The final number is the first one after the last `####` (the form of GSM8K), else the last one in the text.

    >>> completions = ["so it is -1,200.50", "#### 7 apples, of 9", "7 or 8"]
    >>> numeric_answer(["?"] * 3, completions, answer=["-1200.5", "#### 7", 7])
    [1.0, 1.0, 0.0]
    """
    golds = [final_number(str(a)) for a in answer]
    for a, gold in zip(answer, golds, strict=True):
        if gold is None:
            raise ValueError(f"the answer column must hold numbers, got {str(a)[:60]!r}")
    return [float(final_number(c) == gold) for c, gold in zip(completions, golds, strict=True)]


# A minus right after a digit or a bracket is an operator, not a sign: "5-3" ends in 3.
# A long number is matched whole, because its last digits alone are another number. 3/4 is a fraction, 3/4/2020 is not.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?:(?<![)\w.])[-\u2212])?\$?"
    rf"(?:(?<![./]){_WHOLE}/[1-9]\d*(?![/\d]|[.,]\d)|{_WHOLE}(?:\.\d+)?|(?<!\w)\.\d+)(?!\d)"
)


def final_number(text: str) -> Fraction | None:
    """Return a text's final number exactly, or None; `numeric_answer` says which number that is.

    >>> final_number("12 - 5 = 7"), final_number("#### $1,000"), final_number("a half, 1/2"), final_number("minus five")
    (Fraction(7, 1), Fraction(1000, 1), Fraction(1, 2), None)
    """
    text = text[-MAX_TEXT:]
    _, marker, after = text.rpartition("####")
    found = _NUMBER.findall(after)
    if not found:
        return None
    number = found[0] if marker else found[-1]
    if len(number) > MAX_EXPRESSION:
        return None
    return Fraction(number.replace("\u2212", "-").replace(",", "").replace("$", ""))


def marked_answer(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
    """Return 1 if the completion ends with a line `#### answer`, GSM8K's format, and has no other `####`, else 0.

    It does not check the answer; `numeric_answer` does.

    >>> marked_answer(["?"] * 3, ["6 * 7 makes\\n#### 42", "It is 42.", "#### 42, as 6 * 7 makes\\n#### 42"])
    [1.0, 0.0, 0.0]
    """
    return [float(_is_marked(c)) for c in completions]


def _is_marked(text: str) -> bool:
    before, mark, after = text.strip().rpartition("####")
    alone = "####" not in before and (before == "" or before.endswith("\n"))
    return bool(mark) and alone and "\n" not in after and re.search(r"\w", after) is not None


def matches_format(pattern: str) -> RewardFunction:
    """Return a reward function: 1 for a completion that the regular expression matches as a whole, else 0.

    If a match takes more than MAX_SECONDS the completion scores 0, with a warning.

    Args:
        pattern: in the syntax of the package `regex`, which includes that of `re`; a dot matches a newline too.
    Raises: ValueError if the pattern is not a regular expression.

    >>> matches_format(r"<think>.*</think>\\s*<answer>.*</answer>")(["?"], ["<think>hm</think> <answer>4</answer>"])
    [1.0]
    """
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from None

    def matches(text: str) -> bool:
        try:
            return compiled.fullmatch(text, timeout=MAX_SECONDS) is not None
        except TimeoutError:
            warnings.warn(
                f"the pattern {pattern[:80]!r} takes more than {MAX_SECONDS} s for some completions, which score 0. "
                "Does it have nested repeats such as (a+)+?",
                RuntimeWarning,
                stacklevel=2,
            )
            return False

    def format_reward(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
        return [float(matches(c.strip())) for c in completions]

    return format_reward


BUILT_IN: dict[str, RewardFunction] = {
    "countdown": countdown,
    "exact_answer": exact_answer,
    "numeric_answer": numeric_answer,
    "marked_answer": marked_answer,
    "math_answer": math_answer,
}
