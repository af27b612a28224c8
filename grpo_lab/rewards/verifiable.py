"""Verifiable rewards: a number from a completion and the answer. No model, no network; nothing is ever `eval`ed.

Every reward function has the signature `f(prompts, completions, **columns) -> list[float | None]`, where the columns
are the dataset's other columns, and None means that the completion is not scored.
A completion is untrusted input: parsing has limits, and text that does not parse scores 0.
"""

import ast
import operator
import re
import unicodedata
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


# Signs and spaces that texts contain, and what may stand between a sign and its digits: -$18, -\$18, -€5, -**5**.
_MINUS = r"[-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d]"
_BLANK = r"[ \u00a0\u2009\u202f]"
_CURRENCY = rf"(?:\\?\p{{Sc}}|US\\?\$|USD|EUR|GBP|JPY|CNY|INR|CHF|Rs\.?)(?:{_BLANK}|\\[, ])?"
_SIGNED = regex.compile(rf"({_MINUS}|minus|negative)({_BLANK}?)[*_`{{]*(?:{_CURRENCY})?[*_`{{]*{_BLANK}?\Z", regex.I)
# A minus with a space after it is a sign if nothing stands before it or one of these; "12 - 5" is a difference.
_BEFORE_A_SPACED_SIGN = regex.compile(r"(?:\A|[=:(\[{<>≈≤≥*×/,$]|\\approx|\b(?:is|are|was|be|equals?|to))\s*\Z")

# A long number is matched whole, because its last digits alone are another number. 3/4 is a fraction, 3/4/2020 is not.
_SEPARATOR = r"(?:,|\{,\}|,?\\[,!;: ]|['\u2019])"
_WHOLE = (
    r"(?:\d{1,2}(?:,\d{2}(?!\d))++,\d{3}(?!\d|,\d)"  # 1,00,000, as in India
    rf"|\d{{1,3}}(?P<s>{_SEPARATOR})\d{{3}}(?!\d)(?:(?P=s)\d{{3}}(?!\d))*+"
    rf"|(?<!\d{_BLANK})[1-9]\d{{0,2}}(?P<b>{_BLANK})\d{{3}}(?!\d)(?:(?P=b)\d{{3}}(?!\d))*+"
    r"|\d++(?:_\d++)*+)"
)
_DECIMAL_COMMA = (  # 1.000.000, 1.234,50 and 1 234,50
    rf"(?:[1-9]\d{{0,2}}(?:(?:\.\d{{3}}){{2,}}(?:,\d+)?+|(?:\.\d{{3}}|(?:{_BLANK}\d{{3}})+),\d{{1,2}})(?!\d|[.,]\d))"
)
_VULGAR = "[¼-¾⅐-⅞]"
_POWER = rf"(?:\^\s?(?:\{{\s?)?|\*\*(?=[-+\d]))(?P<power>(?:{_MINUS}|\+)?\d+)(?!\d|\.\d)"
_SUPERSCRIPT = r"(?P<power>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)"
_NUMBER = regex.compile(
    rf"(?:(?P<whole>\d{{1,9}}\s?)?\\[dt]?frac\s*\{{\s*(?P<top>{_MINUS}?\d+)\s*\}}\s*\{{\s*(?P<bottom>[1-9]\d*)\s*\}}"
    rf"|(?P<whole>\d{{1,9}}\s?)?(?P<vulgar>{_VULGAR})"
    rf"|(?P<whole>\d{{1,3}}){_BLANK}(?P<top>[1-9]\d?)/(?P<bottom>[1-9]\d?)(?![/\d]|[.,]\d)"
    rf"|(?<![./]){_WHOLE}{_BLANK}?/{_BLANK}?(?P<under>[1-9]\d*)(?![/\d]|[.,]\d)"
    rf"|(?:(?P<european>{_DECIMAL_COMMA})|(?P<plain>{_WHOLE}(?:\.\d++)?+|(?<!\w)\.\d++))"
    rf"(?:[eE](?P<e>(?:{_MINUS}|\+)?\d++)(?!\w|\.\d))?"
    rf"(?:(?P<ten>\s*(?:×|\\times|\\cdot|·|⋅|\*|[xX])\s*10)?(?:{_POWER}|{_SUPERSCRIPT}))?)(?!\d)"
)
_TYPOGRAPHY = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "0123456789+-" + "-" * 7)
MAX_POWER = 400  # of a number's exponent; floats end at 308


def final_number(text: str) -> Fraction | None:
    r"""Return a text's final number exactly, or None; `numeric_answer` says which number that is.

    It reads 1,000.5, 1 000, 1_000, 1'000, 1,00,000, 1{,}000, 1.000.000, 1/2, \frac{1}{2}, 3 1/2, 1e-5, 2 \times 10^{3},
    10^3. Groups of three digits make one number ("5 100" is 5100); any other comma separates two: "3,14" ends in 14.
    A minus may stand before a currency (-$18). With a space after it, it is a sign where no difference is possible:
    "= - 5" ends in -5, "12 - 5" in 5. At the start of a line that is not the first, "- 5" is an item of a list.

    >>> final_number("12 - 5 = 7"), final_number("#### $1,000"), final_number("a half, 1/2"), final_number("minus five")
    (Fraction(7, 1), Fraction(1000, 1), Fraction(1, 2), None)
    """
    _, marker, after = text[-MAX_TEXT:].rpartition("####")
    if marker:
        after = after.lstrip()
        match = _NUMBER.search(after)
    else:
        end = next((i for i in range(len(after), 0, -1) if after[i - 1].isdecimal()), 0)
        match = None
        for match in _NUMBER.finditer(after, max(0, end - 10 * MAX_EXPRESSION)):  # noqa: B007 (the last one counts)
            pass
    if match is None or len(match[0]) > MAX_EXPRESSION:
        return None
    size = _size(match)
    return -size if size is not None and _is_negative(after[: match.start()]) else size


def _size(match: regex.Match) -> Fraction | None:
    """Return the value of a match of _NUMBER; None beyond MAX_POWER."""
    if match["bottom"] or match["vulgar"]:
        if match["vulgar"]:
            part = Fraction(unicodedata.numeric(match["vulgar"])).limit_denominator(10)
        else:
            part = Fraction(int(match["top"].translate(_TYPOGRAPHY)), int(match["bottom"]))
        return part + int(match["whole"] or 0) if 0 < part < 1 else part
    if match["under"]:
        return Fraction(re.sub(r"\D", "", match[0].partition("/")[0])) / int(match["under"])
    if match["european"]:
        size = Fraction(re.sub(r"[^\d,]", "", match["european"]).replace(",", "."))
    else:
        size = Fraction(re.sub(r"[^\d.]", "", match["plain"]))
    shift, power = (int(match[name].translate(_TYPOGRAPHY)) if match[name] else 0 for name in ("e", "power"))
    if max(abs(shift), abs(power)) > MAX_POWER:
        return None
    size *= Fraction(10) ** shift
    if match["ten"]:
        return size * Fraction(10) ** power
    if match["power"] is None:
        return size
    return None if size == 0 and power < 0 else size**power


def _is_negative(before: str) -> bool:
    """Return whether the text before a number ends with its sign, and not with the operator of a difference."""
    near = before[-80:]
    match = _SIGNED.search(near)
    if match is None:
        return False
    near, word = near[: match.start()], match[1].lower()
    if match[2] or word == "minus":
        return _BEFORE_A_SPACED_SIGN.search(near) is not None
    last = near[-1:]  # "5-3", "(2+5)-3" and "it is--3" end in 3
    return not (last.isalnum() or last in tuple("_)]}.%") or regex.fullmatch(_MINUS, last))


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
