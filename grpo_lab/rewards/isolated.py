"""Graders from math-verify and reasoning-gym, run in a subprocess that is killed when an answer takes too long.

Both libraries pass a model's text to SymPy, where nine characters such as 9**9**9**9 may never finish. Their own time
limits are signals, which do not work in threads or on Windows and cannot interrupt one long multiplication; a
subprocess can always be killed. This file is also the subprocess's program, so it imports nothing else of this package.
"""

import atexit
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import cache
from typing import Any

MAX_SECONDS = 3.0  # for one answer; usual ones take milliseconds
STARTING_SECONDS = 120.0  # for the imports; a busy machine is slow
MAX_ANSWER = 10_000  # characters of a completion that are graded, counted from its end
MEMORY = 2**32  # bytes, the subprocess's limit where the system supports one


def math_answer(prompts: Sequence, completions: Sequence[str], answer: Sequence, **columns) -> list[float]:
    r"""Return 1 if the completion's final answer is mathematically equal to the answer, such as 1/2 and 0.5, else 0.

    The final answer is the text after the last `####`, else what math-verify finds: \boxed{} (several close together
    are a set of answers), a formula, or the last number. The answer column holds LaTeX, with or without $, a number, or
    a text that ends in one of these forms. After `####`, Markdown is left out, and words after a number, such as a
    unit. 1e-5 is 0.00001; where LaTeX is possible 2e-5 may also be 2e - 5, with Euler's number. Decimal numbers are
    equal if they agree in six decimals and to 2 parts in 100,000. Needs the package math-verify.
    """
    grader = GraderProcess.of("math_verify")
    return [grader.score(c[-MAX_ANSWER:], str(a)) for c, a in zip(completions, answer, strict=True)]


def gym_score(name: str) -> Callable[..., list[float]]:
    """Return a reward function that scores, from 0 to 1, the text after the last `####`, else the whole completion.

    The scores are those of reasoning-gym's task of this name. The function needs the column "problem": [seed, index,
    size, `checksum` of the question], from which reasoning-gym regenerates the problem.
    """

    def gym(prompts: Sequence, completions: Sequence[str], problem: Sequence, **columns) -> list[float]:
        grader = GraderProcess.of("reasoning_gym", name)
        answers = [c[-MAX_ANSWER:].rpartition("####")[2].strip() for c in completions]
        return [grader.score(answer, p) for answer, p in zip(answers, problem, strict=True)]

    gym.__name__ = name
    return gym


def checksum(question: str) -> int:
    """Return a CRC-32 of the question, to check that a regenerated problem is the same."""
    return zlib.crc32(question.encode("utf-8", "surrogatepass"))


PACKAGES = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}


def require_package(module: str) -> None:
    """Raise ValueError with the install command if the package is missing."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs one more package: pip install {PACKAGES[module]}")


class GraderProcess:
    """A subprocess that grades answers with one library, or one task of it; the first `score` starts it."""

    def __init__(self, module: str, task: str = ""):
        require_package(module)
        self.module, self.task = module, task
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        atexit.register(self.stop)

    @staticmethod
    @cache
    def of(module: str, task: str = "") -> "GraderProcess":
        """Return the shared instance for this library and task."""
        return GraderProcess(module, task)

    def score(self, text: str, reference: Any) -> float:
        """Grade a text; 0, with a warning, if that takes more than MAX_SECONDS or ends the subprocess.

        Raises: ValueError if the library cannot be used, or cannot read the reference answer.
        """
        with self.lock:
            if self.process is not None and self.process.poll() is not None:
                self.stop()  # it ended after its last reply; this text is not the cause
            if self.process is None:
                self._start()
            reply = self._exchange([text, reference], MAX_SECONDS)
        if reply is None:
            warnings.warn(
                f"{PACKAGES[self.module]} takes more than {MAX_SECONDS:g} s for some answers, which score 0.",
                RuntimeWarning,
                stacklevel=2,
            )
            return 0.0
        return reply

    def stop(self) -> None:
        """Kill the subprocess; the next `score` starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        # -P keeps this file's folder out of sys.path; PYTHONPATH lets the subprocess import all that this process can
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, self.module, self.task, str(math.ceil(MAX_SECONDS) + 1)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="ascii",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        if self._exchange(None, STARTING_SECONDS) is None:
            raise ValueError(f"{PACKAGES[self.module]} does not start within {STARTING_SECONDS:g} s.")

    def _exchange(self, request: Any, seconds: float) -> float | None:
        """Send a request and return the reply, both one line of JSON; None if the subprocess ended or was killed."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # the subprocess ended during the write
            line = ""
        except BaseException:  # Ctrl-C: a late reply would be taken for the next request's
            self.stop()
            raise
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            return self.stop()
        reply = json.loads(line)
        if isinstance(reply, str):
            raise ValueError(reply)
        return reply


# --- in the subprocess -----------------------------------------------------------------------------------


class UnreadableError(Exception):
    """The reference answer cannot be read."""


# Numbers that LaTeX reads as something else: 1e-5 is e - 5 there, 1 000 is 1 * 0, and an en dash is no minus.
MINUS = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
DASH = re.compile(rf"(?<![\w)\]}}.%])[{MINUS}](?=\s?[\d.$\\({{])|\u2212")
CURRENCY = re.compile(r"[€£¥₹](?=\s?\d)")
GROUPED = re.compile(
    r"(?<![\w.,])(?:[1-9]\d{0,2}(?:[ \u00a0\u2009\u202f_'\u2019]\d{3})+|[1-9]\d{0,2}(?:\.\d{3}){2,}|"
    r"\d{1,2}(?:,\d{2})+,\d{3})(?![\d_]|[, ]\d)"
)
POWER_OF_TEN = re.compile(
    r"(?<![\w.^/])(\d+(?:\.\d+)?|\.\d+)\s*(?:×|\\times|\\cdot|·|⋅|\*)\s*"
    r"10(?:(?:\^|\*\*)(?:\{\s*([-+]?\d{1,9})\s*\}|([-+]?\d{1,9}))|([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))(?!\d|\.\d)"
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,9})(?![\w{]|\.\d)")
EULER = re.compile(r"(?<![\w.])\d+e[-+][1-9]\d*(?![\w{]|\.\d)")  # 2e-5 may be 2e - 5 in LaTeX
LATEX = re.compile(r"\$|\\boxed|\\\(|\\\[")
MARKUP = (
    re.compile(r"(?<![\w)*])(\*\*|\*)(?=[^\s*])([^*]+)(?<=\S)\1(?![\w(*])"),
    re.compile(r"(?<!\w)(__|_)(?=[^\s_])([^_]+)(?<=\S)\1(?!\w)"),
    re.compile(r"(`{1,3})([^`]+)\1"),
    re.compile(r"^(<)([^<>]+)>$"),
    re.compile(r"^([\"'])([^\"']+)\1$"),
)
KNOWN = "and|or|sqrt|pi|sin|cos|tan|sec|csc|cot|log|ln|exp|arcsin|arccos|arctan|infty|infinity|mod"
KNOWN += "|plus|minus|times|over|divided|squared|cubed|hundred|thousand|million|billion|trillion|dozen|half"
FUNCTION = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|sec|csc|cot|log|ln|exp|arcsin|arccos|arctan|infty)(?![A-Za-z])")
SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
WORD = rf"(?!(?:{KNOWN})\b)(?:[A-Za-z]{{3,}}|(?:[kcm]m|kg|mg|ml|ft|lbs?|oz|hr|mph)(?:/[a-z]+)?)\b"
PROSE = re.compile(rf"(?<![\\A-Za-z])(?!(?:{KNOWN})\b)[A-Za-z]{{3,}}\b")
COUNTED = re.compile(rf"\s*\\?\$?\s*([-+]?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+))(?: (?:{WORD})|[.,;:]?\s*$)")
UNITS = re.compile(rf"(?<=[\d}})%$])(?:[\s/]+{WORD})+[.!]?\s*$")


def plain_numbers(text: str, *, euler: bool = False) -> str:
    """Return the text with its numbers as plain digits: 1e-5 as 0.00001, 1 000 as 1000, a dash before one as "-".

    Args:
        euler: leave "2e-5", which may be a difference with Euler's number.
    """

    def expand(match: re.Match) -> str:
        if euler and EULER.fullmatch(match[0]):
            return match[0]
        return f"{Decimal(match[0]):f}" if abs(int(match[2])) <= 400 else "NaN"

    def with_exponent(match: re.Match) -> str:
        number, *powers = match.groups()
        power = int(next(filter(None, powers)).translate(SUPERSCRIPTS))
        return f"{number}e{power:+05d}"  # with zeros, so that Euler's number cannot be meant

    text = POWER_OF_TEN.sub(with_exponent, CURRENCY.sub("", DASH.sub("-", text)))
    return EXPONENT.sub(expand, GROUPED.sub(lambda match: re.sub(r"[^\d]", "", match[0]), text))


def without_markup(formula: str) -> str:
    """Return a formula without Markdown, and without the unit or the words after a leading number."""
    formula = formula.strip()
    for markup in MARKUP:
        formula = markup.sub(r"\2", formula).strip()
    if counted := COUNTED.match(formula):
        return counted[1]
    return UNITS.sub("", formula)


def nearly_equal(library: Callable) -> Callable:
    """Return the library's comparison of two numbers, which must also agree to 2 parts in 100,000.

    Alone it rounds to six decimals, which makes all tiny numbers equal, and finds no integer equal to a float.
    """
    from math_verify.grader import Float, Integer, is_atomic_or_pct_atomic

    def equal(a, b, *settings) -> bool:
        same = library(a, b, *settings)
        if same and all(is_atomic_or_pct_atomic(x, Integer) for x in (a, b)):
            return True  # 9% for 9
        try:
            if not same and not (a.has(Float) or b.has(Float)):
                return False
            x, y = a.doit().evalf(), b.doit().evalf()
            if not (x.is_finite and y.is_finite):
                return same
            return bool(abs(x - y) <= (2e-5 if same else 1e-12) * max(abs(x), abs(y)))
        except (AttributeError, TypeError, ValueError):
            return same  # not two numbers

    return equal


def math_grader(_: str) -> Callable[[str, str], float]:
    """Return a grader that compares with math-verify, its own time limits turned off."""
    from math_verify import grader, parse, verify

    grader.sympy_numeric_eq = nearly_equal(grader.sympy_numeric_eq)

    def read(text: str) -> list:
        return parse(text, parsing_timeout=None)

    def read_formula(text: str) -> list:
        """Read LaTeX without dollars, or a number among words."""
        formula = without_markup(text)
        if "\\" not in formula and PROSE.search(formula) and (found := read(formula)):
            return found
        formula = FUNCTION.sub(r"\\\1", SQRT.sub(r"\\sqrt{\1}", formula))
        latex = read(f"${formula}$")
        return latex if any(not isinstance(value, str) for value in latex) else read(formula) or latex

    def parse_answer(text: str, bare: Callable[[str], list]) -> list:
        _, mark, after = text.rpartition("####")
        has_latex = not mark and LATEX.search(text) is not None
        read_one = read_formula if mark else read if has_latex else bare
        text = after if mark else text
        readings = read_one(plain_numbers(text))
        if EULER.search(text) and (has_latex or read_one is read_formula):
            return readings + read_one(plain_numbers(text, euler=True))
        return readings

    def grade(text: str, reference: str) -> float:
        gold = parse_answer(reference, read_formula)
        if not gold:
            raise UnreadableError(f"the answer column must hold LaTeX or numbers, got {reference[:60]!r}")
        return float(verify(gold, parse_answer(text, read), timeout_seconds=None))

    if grade(r"so it is \boxed{0.5}", r"\frac{1}{2}") != 1.0:
        raise ImportError("its check that 0.5 equals 1/2 failed")
    return grade


# Some of reasoning-gym's scorers run an answer as Python: eval(answer), sympy.parse_expr(answer). An answer without
# calls, attributes, and escapes or comments that could hide them can only compute.
FUNCTIONS = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|abs"
EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
UNSAFE = re.compile(rf"__|[\\#@`]|\.\s*[^\W\d]|[\])}}'\"]\s*\(|(?!\b(?:{FUNCTIONS})\s*\()\b\w+\s*\(")


def gym_grader(name: str) -> Callable[[str, list[int]], float]:
    """Return a grader that calls the task's own `score_answer`."""
    import inspect

    import reasoning_gym

    @cache
    def dataset(seed: int, size: int):
        return reasoning_gym.create_dataset(name, seed=seed, size=size)

    source = inspect.getsource(inspect.getmodule(type(dataset(0, 1))))
    evaluates = EVALUATES.search(source) is not None

    @cache
    def problem(seed: int, index: int, size: int, expected: int) -> dict[str, Any]:
        entry = dataset(seed, size)[index]
        # some tasks iterate over a set, whose order depends on the hash seed
        if checksum(entry["question"]) != expected:
            raise UnreadableError(f"{name} makes another problem each time. Set PYTHONHASHSEED=0 for the whole run.")
        return entry

    def grade(text: str, reference: list[int]) -> float:
        if evaluates and UNSAFE.search(text):
            return 0.0
        seed, _, size, _ = reference
        return float(dataset(seed, size).score_answer(answer=text, entry=problem(*reference)))

    return grade


def serve(module: str, task: str, alarm_seconds: str) -> None:
    """Reply to each line of stdin with one line on stdout, a number or an error message, until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent, which kills this process
    alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has no alarm
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a library's prints go to stderr, not between the replies

    def reply(value: float | str) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    if os.name == "posix":
        import resource

        with suppress(ValueError, OSError):  # a lower limit is already set
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        grade = {"math_verify": math_grader, "reasoning_gym": gym_grader}[module](task)
    except Exception as error:
        grade = None
        problem = f"{PACKAGES[module]} cannot be used here ({type(error).__name__}: {error})."
    for line in sys.stdin:
        request = json.loads(line)
        if grade is None:
            reply(problem)
        elif request is None:
            reply(1.0)
        else:
            alarm(int(alarm_seconds))  # ends this process if the parent is gone and cannot kill it
            try:
                reply(grade(*request))
            except UnreadableError as error:
                reply(str(error))
            except Exception:  # the library failed on a malformed answer
                reply(0.0)
            alarm(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
