"""Judges that are other people's libraries, in a process of its own that is stopped when an answer takes too long.

math-verify and reasoning-gym give what a model writes to SymPy, where nine characters, 9**9**9**9, compute for ever.
Their own limits are signals, which neither a thread nor Windows has, and which wait for a long multiplication; a
process can be ended. This file is also the program that runs there, so it imports nothing of this package.
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
STARTING_SECONDS = 120.0  # for the imports, on a busy machine
MAX_ANSWER = 10_000  # characters that are read of an answer, from the end
MEMORY = 2**32  # bytes that the process may have, where the system can say so


def math_answer(prompts: Sequence, completions: Sequence[str], answer: Sequence, **columns) -> list[float]:
    r"""1 if the completion's final answer equals the answer as mathematics, 1/2 and \frac{1}{2} and 0.5, else 0.

    Read is what stands behind the last `####`, else what math-verify finds: \boxed{} (several near each other are a set
    of answers), a formula, or the last number. The answer column holds LaTeX, with or without $, a number, or a text
    that ends in one of these forms. Needs the package math-verify.
    """
    judge = GraderProcess.of("math_verify")
    return [judge.score(c[-MAX_ANSWER:], str(a)) for c, a in zip(completions, answer, strict=True)]


def gym_score(name: str) -> Callable[..., list[float]]:
    """The score, 0 to 1, of reasoning-gym's task of this name for what stands behind the last `####`, else for all.

    The reward wants the column "problem": [seed, number, size, question's `checksum`], of which reasoning-gym makes the
    problem again.
    """

    def gym(prompts: Sequence, completions: Sequence[str], problem: Sequence, **columns) -> list[float]:
        judge = GraderProcess.of("reasoning_gym", name)
        answers = [c[-MAX_ANSWER:].rpartition("####")[2].strip() for c in completions]
        return [judge.score(answer, p) for answer, p in zip(answers, problem, strict=True)]

    gym.__name__ = name
    return gym


def checksum(question: str) -> int:
    """Tells whether a problem that is made again is the same."""
    return zlib.crc32(question.encode("utf-8", "surrogatepass"))


PACKAGES = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}


def require_package(module: str) -> None:
    """Raises ValueError with the command that installs the package, if it is not there."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs one more package: pip install -c constraints.txt {PACKAGES[module]}")


class GraderProcess:
    """A process that judges answers: those of one library, or of one of its tasks. It is started when first asked."""

    def __init__(self, module: str, task: str = ""):
        require_package(module)
        self.module, self.task = module, task
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        atexit.register(self.stop)

    @staticmethod
    @cache
    def of(module: str, task: str = "") -> "GraderProcess":
        """The one process for it."""
        return GraderProcess(module, task)

    def score(self, text: str, right: Any) -> float:
        """What the judge gives; 0, with a warning, if it takes more than MAX_SECONDS, or ends over the text.

        Raises: ValueError if the judge cannot work, or cannot read the right answer.
        """
        with self.lock:
            if self.process is not None and self.process.poll() is not None:
                self.stop()  # it ended since its last answer, which is not this one's fault
            if self.process is None:
                self._start()
            reply = self._exchange([text, right], MAX_SECONDS)
        if reply is None:
            warnings.warn(
                f"{PACKAGES[self.module]} takes more than {MAX_SECONDS:g} s for some answers, which score 0.",
                RuntimeWarning,
                stacklevel=2,
            )
            return 0.0
        return reply

    def stop(self) -> None:
        """End the process; the next answer starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        # -P: the folder of this file must not be searched for modules; what this process can import, that one can
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, self.module, self.task, str(math.ceil(MAX_SECONDS) + 1)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="ascii",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        if self._exchange(None, STARTING_SECONDS) is None:
            raise ValueError(f"{PACKAGES[self.module]} does not start within {STARTING_SECONDS:g} s.")

    def _exchange(self, request: Any, seconds: float) -> float | None:
        """A request and its reply, both a line of JSON; None if the process ended, by our hand or not."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # it ended while we wrote
            line = ""
        except BaseException:  # Ctrl-C: the reply that is on its way would be taken for the next one's
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


# --- in that process -------------------------------------------------------------------------------------


class UnreadableError(Exception):
    """The right answer cannot be read."""


def math_judge(_: str) -> Callable[[str, str], float]:
    """Compares by math-verify, whose limits by signal are off."""
    from math_verify import parse, verify

    def reading(text: str) -> list:
        _, mark, after = text.rpartition("####")
        if not mark and re.search(r"\$|\\boxed|\\\(|\\\[", text):
            return parse(text, parsing_timeout=None)
        formula = after.strip()
        return parse(f"${formula}$", parsing_timeout=None) or parse(formula, parsing_timeout=None)

    def judge(text: str, right: str) -> float:
        gold = reading(right)
        if not gold:
            raise UnreadableError(f"the answer column must hold LaTeX or numbers, got {right[:60]!r}")
        found = reading(text) if "####" in text else parse(text, parsing_timeout=None)
        return float(verify(gold, found, timeout_seconds=None))

    if judge(r"so it is \boxed{0.5}", r"\frac{1}{2}") != 1.0:
        raise ImportError("it does not find that 0.5 is a half")
    return judge


# Some scorers of reasoning-gym run an answer as Python: eval(answer), sympy.parse_expr(answer). Without a call, an
# attribute, an escape or a comment that hides one, what is left computes and does nothing else.
FUNCTIONS = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|abs"
RUNS_ANSWERS = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
MAY_DO_MORE = re.compile(rf"__|[\\#@`]|\.\s*[^\W\d]|[\])}}'\"]\s*\(|(?!\b(?:{FUNCTIONS})\s*\()\b\w+\s*\(")


def gym_judge(name: str) -> Callable[[str, list[int]], float]:
    """Scores by the task's own `score_answer`."""
    import inspect

    import reasoning_gym

    @cache
    def dataset(seed: int, size: int):
        return reasoning_gym.create_dataset(name, seed=seed, size=size)

    source = inspect.getsource(inspect.getmodule(type(dataset(0, 1))))
    runs_answers = RUNS_ANSWERS.search(source) is not None

    @cache
    def problem(seed: int, number: int, size: int, question: int) -> dict[str, Any]:
        made = dataset(seed, size)[number]
        if checksum(made["question"]) != question:  # its order of drawing hangs on the order of a set
            raise UnreadableError(f"{name} makes another problem each time. Set PYTHONHASHSEED=0 for the whole run.")
        return made

    def judge(text: str, right: list[int]) -> float:
        if runs_answers and MAY_DO_MORE.search(text):
            return 0.0
        return float(dataset(right[0], right[2]).score_answer(answer=text, entry=problem(*right)))

    return judge


def serve(module: str, task: str, last: str) -> None:
    """Answer each line of standard input by one on standard output, a number or a sentence, until there is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the run, which ends this process
    alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has none
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no reply

    def reply(value: float | str) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    if os.name == "posix":
        import resource

        with suppress(ValueError, OSError):  # a lower limit is there already
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        judge = {"math_verify": math_judge, "reasoning_gym": gym_judge}[module](task)
    except Exception as error:
        judge = None
        problem = f"{PACKAGES[module]} cannot be used here ({type(error).__name__}: {error})."
    for line in sys.stdin:
        request = json.loads(line)
        if judge is None:
            reply(problem)
        elif request is None:
            reply(1.0)
        else:
            alarm(int(last))  # ends this process, should the one that was to end it be gone
            try:
                reply(judge(*request))
            except UnreadableError as error:
                reply(str(error))
            except Exception:  # of the library, over a text that is no answer
                reply(0.0)
            alarm(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
