"""The subprocess graders: what they find equal, and that no text makes them hang, run code or score wrongly."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from grpo_lab.rewards import isolated
from grpo_lab.rewards.isolated import UNSAFE, GraderProcess, checksum, gym_score, math_answer

SLOW = [r"\boxed{9^{9^{9^9}}}", r"#### \binom{10^9}{10^8}"]  # SymPy never finishes
HOSTILE = [
    *["", " ", "nan", r"\boxed{}", r"\boxed{", r"\boxed{" * 1000, "$", "$$", "####", "#### ####", r"\frac{1}{0}"],
    *["(" * 10**6, r"\frac{" * 2000 + "1", "\ud800", "\0", "1+" * 5000, "9**9**9**9", "$" * 10**6],
    *[r"\input{/etc/passwd}", "__import__('os').system('true')", "$x=__import__('os')$", "eval('7')", "lambda: 7"],
    *[r"\infty", "{" * 10**5, "[7]"],
]  # fmt: skip


@pytest.fixture(scope="module")
def math():
    pytest.importorskip("math_verify")
    return lambda text, answer: math_answer(["?"], [text], [answer])[0]


# --- mathematics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\dfrac12}", r"$\frac{1}{2}$"),
        (r"#### \frac{1}{2}", "0.5"),
        ("#### 1/2", r"We halve it: \boxed{\frac12}."),
        ("#### 7", "12 - 5 = 7\n#### 7"),
        ("It is 1,200.", 1200),
        ("#### x^2+1", "1 + x^2"),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"one is \boxed{3}, the other \boxed{4}", r"\{3, 4\}"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        ("It is $x = 3$.", "3"),
        (r"\boxed{10\%}", "0.1"),
        ("#### -4", "-4"),
        *[
            (f"#### {said}", "73")
            for said in ("**73**", "73 dollars", "`73`", "*73*", "<73>", "__73__", "**73** books.")
        ],
        *[
            (f"#### {said}", "12")
            for said in ("12 books", "12 books and 3 pens", "The answer is 12.", "12 km/h", "$12")
        ],
        ("#### 12", "12 books"),
        (r"#### \frac{1}{2} dollars", "0.5"),
        ("#### 3 and 5", r"\{3, 5\}"),
        ("#### no solution", "no solution"),
        ("#### 2 pi", r"2\pi"),
        ("#### 2 sqrt(3)", r"\sqrt{12}"),
        (r"\boxed{1.6\times 10^{-19}}", r"1.6\times 10^{-19}"),
        (r"\boxed{0.00000016}", r"1.6\times 10^{-7}"),
        ("#### 0.033333", r"\frac{1}{30}"),
        ("#### 0.00001", 1e-5),
        (r"\boxed{1e-5}", "0.00001"),
        ("#### 10000000000000000", 1e16),
        ("it is 6.02e23", r"6.02\times 10^{23}"),
        (r"\boxed{2e-5}", "2e - 5"),  # Euler's number
        ("#### \u20135", "-5"),
        ("#### -€5", "-5"),
        *[(f"#### {said}", "1000") for said in ("1 000", "1_000", "1\u202f000", "1'000", "1{,}000", r"1,\!000")],
        ("#### 1.000.000", "1,00,00,000/10"),
        ("#### 1 000.5", "1000.5"),
        ("It is 3 × 10^8 m/s.", "3e8"),
        ("#### 3×10⁸", r"3\times 10^{8}"),
        (r"\boxed{2.5\cdot 10^{-3}}", "0.0025"),
    ],
)
def test_what_is_equal_as_mathematics_scores_one(math, text, answer):
    assert math(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}"),
        (r"\boxed{4}, or was it \boxed{3}?", "4"),
        ("#### 7", "8"),
        ("7 #### 8", "7"),
        (r"\boxed{(2, 1)}", "(1,2)"),
        ("#### 4", "-4"),
        ("#### x^2 - 1", "x^2+1"),
        ("no idea", "7"),
        (r"\boxed{1.6\times 10^{-19}}", r"6.63\times 10^{-34}"),
        ("#### 0.0000002", "0.0000001"),
        ("#### 0", "0.0000001"),
        (r"\boxed{\{0.0000001, 3\}}", r"\{0.0000002, 3\}"),
        ("23", "6.02e23"),
        ("It is 3 × 10^8 m/s.", "8"),
        ("It is 3 × 10^8 m/s.", "10"),
        (r"\boxed{2^3\times 10^2}", "600"),
        ("6.02", "6.02e23"),
        ("#### 1e999", "1"),
        ("#### \u20135", "5"),
        ("#### 1 000", "0"),
        ("#### 12 sqrt(3)", "12"),
        ("#### 13 books", "12"),
        ("#### 5 million", "5"),
        (r"\boxed{\infty}", "0.5"),
        ("#### 2x", "2"),
    ],
)
def test_what_is_not_equal_scores_nothing(math, text, answer):
    assert math(text, answer) == 0.0


def test_numbers_become_plain_digits_and_other_text_stays():
    assert isolated.plain_numbers("\u20135, " r"$-1{,}000 + 2 - 3$, 1 000, 2e3, 1.5\times 10^{-3}") == (
        r"-5, $-1{,}000 + 2 - 3$, 1000, 2000, 0.0015"
    )
    same = r"2e^3 + 2x - 7, (1, 2), f'(2), x_1, 3.5.1, 1990–2000, 4-2e, \frac{1}{3}\times 10^2, 5 2"
    assert isolated.plain_numbers(same) == same
    assert isolated.plain_numbers("2e-5 2e-05 3*10^-5", euler=True) == "2e-5 0.00002 0.00003"
    assert isolated.plain_numbers("1e-999999999") == "NaN"


def test_the_grader_of_the_subprocess_by_itself(math):
    grade = isolated.math_grader("")
    assert grade(r"\boxed{1.6\times 10^{-19}}", r"6.63\times 10^{-34}") == 0.0
    assert grade(r"\frac{1}{0}", "-4242.5") == 0.0  # infinite
    assert grade("#### 0.00001", "1e-5") == grade("#### 73 dollars", "73") == grade("#### `73`", "73") == 1.0


@pytest.mark.filterwarnings("ignore:math-verify takes more than")
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:16]))
def test_hostile_text_scores_nothing(math, monkeypatch, text):
    monkeypatch.setattr(isolated, "MAX_SECONDS", 1.0)
    assert math(text, "-4242.5") == 0.0


@pytest.mark.parametrize("text", SLOW)
def test_a_computation_that_never_ends_is_killed_and_the_next_answer_is_graded(math, monkeypatch, text):
    assert math("#### 7", "7") == 1.0  # the subprocess runs
    monkeypatch.setattr(isolated, "MAX_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"math-verify takes more than 0\.5 s for some answers, which score 0"):
        assert math(text, "7") == 0.0
    assert time.monotonic() - began < 20
    monkeypatch.undo()
    assert math("#### 7", "7") == 1.0


def test_a_grader_killed_between_two_answers_is_restarted(math):
    assert math("#### 7", "7") == 1.0
    grader = GraderProcess.of("math_verify")
    grader.process.kill()  # as the OOM killer does
    grader.process.wait()
    assert math("#### 7", "7") == 1.0


def test_a_reference_answer_that_cannot_be_parsed_is_an_error(math):
    with pytest.raises(ValueError, match="the answer column must hold LaTeX or numbers, got ''"):
        math("#### 7", "")
    assert math("#### 7", "7") == 1.0


def test_the_alarm_does_not_run_between_two_answers(math):
    grader = GraderProcess.of("math_verify")
    grader.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated, "MAX_SECONDS", 0.0)  # so its alarm would end it after a second
        grader._start()
    process = grader.process
    assert grader._exchange(["7", "7"], 60) == 1.0
    time.sleep(1.5)
    assert math("#### 7", "7") == 1.0
    assert grader.process is process
    grader.stop()  # the next one has the usual limit


def test_it_works_in_a_thread(math):
    found = []
    thread = threading.Thread(target=lambda: found.append(math(r"\boxed{0.5}", r"\frac12")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_it_works_with_a_reward_timeout(math):
    from grpo_lab.rewards.reward_models import Rewards

    scored = Rewards(math_answer, None, timeout=60)(["?"] * 2, ["#### 1/2", "#### 2"], {"answer": ["0.5", "0.5"]})
    assert scored.first.tolist() == [1.0, 0.0]


@pytest.mark.skipif(os.name == "nt", reason="sends a signal to a process group")
def test_ctrl_c_in_the_terminal_does_not_end_the_grader(math):
    code = (
        "import os, signal, time\nfrom grpo_lab.rewards.isolated import GraderProcess\n"
        "grader = GraderProcess.of('math_verify')\n"
        "grader.score('7', '7')\nbefore = grader.process.pid\nsignal.signal(signal.SIGINT, lambda *_: None)\n"
        "os.killpg(0, signal.SIGINT)\ntime.sleep(0.2)\nprint(grader.score('7', '7'), grader.process.pid == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert (done.stdout, done.stderr) == ("1.0 True\n", "")


def test_a_reply_after_ctrl_c_is_not_taken_for_the_next_answers(math, monkeypatch):
    grader = GraderProcess.of("math_verify")
    assert math("#### 7", "7") == 1.0

    class Interrupted:
        def __init__(self, stream):
            self.stream = stream

        def readline(self):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.stream, name)

    monkeypatch.setattr(grader.process, "stdout", Interrupted(grader.process.stdout))
    with pytest.raises(KeyboardInterrupt):
        math("#### 7", "7")
    assert grader.process is None
    assert math("#### 8", "7") == 0.0


def test_it_ends_with_its_parent(math):
    code = "from grpo_lab.rewards.isolated import GraderProcess\n"
    code += "j = GraderProcess.of('math_verify')\nj.score('7', '7')\nprint(j.process.pid)"
    process = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    assert not running(process)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no alarm")
def test_its_alarm_ends_it_if_the_parent_was_killed(math):
    code = f"""
import os, signal, threading
from grpo_lab.rewards import isolated
isolated.MAX_SECONDS = 1.0
grader = isolated.GraderProcess.of("math_verify")
grader.score("7", "7")
print(grader.process.pid, flush=True)
isolated.MAX_SECONDS = 1e6
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGKILL]).start()
grader.score({SLOW[0]!r}, "7")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    deadline = time.monotonic() + 30
    while running(int(run.stdout)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running(int(run.stdout))


def running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_library_that_cannot_be_imported_is_named_with_the_cause(math, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr')")
    monkeypatch.syspath_prepend(tmp_path)
    grader = GraderProcess("math_verify")
    with pytest.raises(ValueError, match=r"math-verify cannot be used here \(ImportError: no antlr\)"):
        grader.score("7", "7")
    grader.stop()


# --- reasoning-gym ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["exit()", "exit ()", "exit\n()", "(exit)()", "[exit][0]()", "'a'()", "{1: exit}[1]()", "x.y", "(1).real", "1 . r",
     "__import__", "a\\\nb", "'\\x28'", "exit#\n()", "f'{exit()}'", "ｅxit()", "notsin(x)", "sin(x).subs",
     "lambda: exit()", "@exit", "`exit`", "exit(1)*sin(x)", "sin(exit(1))", "(lambda: 1)()", "expit(1)"],
)  # fmt: skip
def test_an_answer_that_could_call_something_is_not_evaluated(text):
    assert UNSAFE.search(text)


@pytest.mark.parametrize(
    "text",
    ["6*(98 - 54) - 34 - 66", "(3+5)*7", "1.5 + 2", ".5*x", "x**2/2 + C", "sin(x)*cos (x) + log(x) + sqrt(2)",
     "exp(-x)", "[['Q', '_'], ['_', 'Q']]", "[1, 2, 3]", "['A', 'B']", "Q _ _\n_ Q _", "0 1\n1 0", "-12", "1/2"],
)  # fmt: skip
def test_an_answer_that_only_computes_is_evaluated(text):
    assert not UNSAFE.search(text)


@pytest.mark.parametrize("name", ["n_queens", "spiral_matrix", "countdown", "simple_integration"])
def test_scorers_that_run_answers_run_no_code_and_know_the_right_one(name, tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset(name, seed=7, size=3)[2]
    trace = tmp_path / "trace"
    harmful = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    answers = [f"hm\n#### {entry['answer']}", harmful, f"open({str(trace)!r}, 'w')", f"[{harmful}]"]
    scores = gym_score(name)(["?"] * 4, answers, problem=[[7, 2, 3, checksum(entry["question"])]] * 4, answer=["?"] * 4)
    assert scores == [1.0, 0.0, 0.0, 0.0]
    assert not trace.exists()


def test_a_problem_that_is_regenerated_differently_is_an_error():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=r"leg_counting makes another problem each time\. Set PYTHONHASHSEED=0"):
        gym_score("leg_counting")(["?"], ["7"], problem=[[7, 2, 3, checksum("another")]])
