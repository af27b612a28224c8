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
    a text that ends in one of these forms. Needs the package math-verify.
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


def math_grader(_: str) -> Callable[[str, str], float]:
    """Return a grader that compares with math-verify, its own time limits turned off."""
    from math_verify import parse, verify

    def parse_answer(text: str) -> list:
        _, mark, after = text.rpartition("####")
        if not mark and re.search(r"\$|\\boxed|\\\(|\\\[", text):
            return parse(text, parsing_timeout=None)
        formula = after.strip()
        return parse(f"${formula}$", parsing_timeout=None) or parse(formula, parsing_timeout=None)

    def grade(text: str, reference: str) -> float:
        gold = parse_answer(reference)
        if not gold:
            raise UnreadableError(f"the answer column must hold LaTeX or numbers, got {reference[:60]!r}")
        found = parse_answer(text) if "####" in text else parse(text, parsing_timeout=None)
        return float(verify(gold, found, timeout_seconds=None))

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
