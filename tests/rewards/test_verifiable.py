"""Verifiable rewards: right, wrong and hostile text. No text takes long to score or runs as code."""

import signal
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lab.rewards.verifiable import (
    BUILT_IN,
    MAX_EXPRESSION,
    MAX_TEXT,
    countdown,
    evaluate_expression,
    exact_answer,
    final_number,
    marked_answer,
    matches_format,
    numeric_answer,
)

PROMPT = "3,5,7:22="
HOSTILE = [
    *["9**9**9", "9**9**9**9**9", "3**5", "3//5", "3%5", "3<<9", "~3", "3@5", "7if 1else 3"],
    *["(" * 50 + "3" + ")" * 50, "(" * 49 + "3", "(" * 10**6, "(" * 10**6 + "3" + ")" * 10**6, "3)", "()", "((3)("],
    *["+".join("1" * 10**5), "1" * 10, "9" * 10**6, "1" * 10 + "*3", "3+" * 10**6 + "3"],
    *["-3+5", "+3", "3-(-5)", "--3", "3*-5", "3+ +5", "3* *5", "3/ /5"],
    *["3/0", "3/(5-5)", "1/(1/3-1/3)", "0/0"],
    *["٣+٥", "３+５", "³+1", "3×5", "3−5", "①", "3\u200b+5", "3\x00", "\ud800"],
    *["03+5", "3_5+7", "0x10", "3.0", "1e9", "3j", "3,5", "3 5", "3(5)", "(3)(5)", "3()"],
    *["", " ", "\n", "3\n+5", "3;5", "3#5", "3*5+7=22", "=22", "twenty-two"],
    *["__import__('os').system('true')", "True", "print(22)", "[22]", "'22'", "lambda: 22", "(yield)"],
]
PIECES = [
    "1e",
    "1e5",
    "1 ",
    "1 000 ",
    "1_",
    "2^",
    "1 /",
    "10*",
    "- ",
    "-€",
    r"\frac{",
    "1,00,",
    "1.000",
    "1.000.",
    "1",
    "-",
    "$",
    ",",
    ".",
    "#",
    "#### ",
    "1,",
    "1.",
    "1,111",
    ",111",
    "-$",
    "1,234,",
    "٣",
    " ",
]
LONG_TEXT = [
    *[piece * 10**6 for piece in PIECES],
    *[start + ",111" * 10**5 + end for start in ("1", "-$1", "1234") for end in ("", "1", "x", ".")],
    *["1" * 10**6 + "x", "1," * 10**6 + "x", "#### " + "9" * 10**6, "0." + "3" * 10**6, "\ud800" * 10**6],
]


@pytest.fixture(autouse=True)
def fail_on_hang():
    """Fail a test after 10 seconds, so that a computed `9**9**9` cannot hang the run. (Windows has no such timer.)"""

    def stop(*_):
        raise AssertionError(
            "the reward still runs after 10 seconds"
        )  # not a TimeoutError, which the reward would catch

    if hasattr(signal, "setitimer"):
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 10)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    else:
        yield


def seconds(function, *args):
    """Return the CPU time of a call; other work on the machine does not change it."""
    start = time.process_time()
    function(*args)
    return time.process_time() - start


@pytest.mark.parametrize("text", ["3*5+7", "7+5*3", " 3 * 5 + 7\n", "((3)*(5))+7", "(" * 40 + "3*5+7" + ")" * 40])
def test_countdown_pays_for_a_solution_however_it_is_written(text):
    assert countdown([PROMPT], [text]) == [1.0]


@pytest.mark.parametrize("text", ["3+5+7", "22", "3*5", "3*5+7+7-7", "3*5+7*1", "35-13", "15+7", "(3+5)*7", "7+15"])
def test_countdown_pays_nothing_for_a_wrong_number_of_numbers_or_a_wrong_value(text):
    assert countdown([PROMPT], [text]) == [0.0]


def test_countdown_is_exact_and_counts_a_number_as_often_as_the_prompt_does():
    assert countdown(["1,3,49,49:3="] * 2, ["1/49*49*3", "1/49*49*3+3-3"]) == [1.0, 0.0]  # in floats 1/49*49 < 1
    assert countdown(["5,5,7:17="] * 3, ["5+5+7", "5+12", "7+5+5"]) == [1.0, 0.0, 1.0]
    assert countdown(["2,3:0="], ["2/3"]) == [0.0]  # not rounded down


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_text_scores_nothing_at_once(text):
    assert countdown([PROMPT], [text]) == [0.0]
    assert evaluate_expression(text) is None
    assert seconds(evaluate_expression, text) < 0.2


@pytest.mark.parametrize("prompt", ["3,5,7=22", "3,5,7:22", "what is 3*5+7?", "", "3,,5:8=", "-3,5:2="])
def test_a_prompt_that_is_no_countdown_is_an_error_that_shows_one(prompt):
    with pytest.raises(ValueError, match='looks like "3,5,7:22=", got'):
        countdown([prompt], ["3"])


def combine(parts):
    (left, a, used_left), operator, (right, b, used_right) = parts
    if operator == "/" and b == 0:
        operator = "+"
    value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[operator]()
    return f"({left} {operator}{right})", value, used_left + used_right


EXPRESSIONS = st.recursive(
    st.integers(0, 999).map(lambda n: (str(n), Fraction(n), [n])),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(combine),
    max_leaves=6,
)


@given(EXPRESSIONS)
@settings(deadline=None, max_examples=50)
def test_an_expression_has_its_exact_value_and_lists_its_numbers(expression):
    text, value, used = expression
    assert evaluate_expression(text) == (value, sorted(used))


@given(st.text("0123456789+-*/() .e_x,=", max_size=40) | st.text(max_size=40))
@settings(deadline=None, max_examples=50)
def test_no_text_raises(text):
    assert countdown([PROMPT], [text])[0] in (0.0, 1.0)
    assert numeric_answer(["?"], [text], answer=[7])[0] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 7", "7"),
        ("7 or 8", "8"),  # the last one
        ("-7", "-7"),
        ("x = -7.", "-7"),
        ("\u22127", "-7"),  # a typographic minus
        ("(-7)", "-7"),
        ("5-3", "3"),  # an operator, not a sign
        ("12 - 5", "5"),
        ("(2+5)-3", "3"),
        ("x-3", "3"),
        ("2*-3", "-3"),
        ("1,200", "1200"),
        ("1,234,567.50", "1234567.5"),
        ("1, 2, 30", "30"),  # a list, not thousands
        ("3,5,77", "77"),
        ("0.5", "1/2"),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("it is.5", "5"),  # a full stop
        ("5.", "5"),
        ("$7", "7"),
        ("-$1,000.25", "-1000.25"),
        ("$-7", "-7"),
        ("50%", "50"),
        ("**7** apples", "7"),
        (r"\boxed{-7}", "-7"),
        ("007", "7"),
        ("1 #### 7 apples, of 9", "7"),  # the first after the mark
        ("#### 7\n#### 8", "8"),  # the last mark
        ("####-7", "-7"),
        ("7 ####", None),  # nothing after it: no answer
        ("no number", None),
        ("", None),
        ("#### 1/2", "1/2"),
        ("-3/4 of it", "-3/4"),
        ("1,000/3.", "1000/3"),
        ("48/2=24", "24"),
        ("5/day", "5"),
        ("3/4/2020", "2020"),  # a date
        ("1/0", "0"),
        ("2/3.5", "3.5"),
        ("1" + "0" * 40, str(10**40)),  # whole, not its last digits
        ("0." + "3" * 40, "0." + "3" * 40),
        ("9" * 200, None),  # no answer has 200 digits
        # powers of ten
        ("1e-05", "1/100000"),
        ("so it is 1.5E+03.", "1500"),
        ("2e\u22123", "1/500"),
        ("-5e-3", "-1/200"),
        ("6.02e23", "6.02e23"),
        ("1e999", None),  # beyond every float
        ("1e5b", "5"),  # no exponent
        (r"1.5\times 10^{3}", "1500"),
        ("1.5 × 10^-3", "3/2000"),
        ("1.5·10³", "1500"),
        ("1.5*10**3", "1500"),
        ("7 * 10 = 70", "70"),
        (r"10^{-2}", "1/100"),
        ("2^10", "1024"),
        ("0^-1", None),
        (r"90^\circ", "90"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"\dfrac{-1}{2}", "-1/2"),
        ("1 / 2", "1/2"),
        # signs apart from their digits
        (r"#### -\$18", "-18"),
        ("#### - 5", "-5"),
        ("- 5", "-5"),
        ("\u20135", "-5"),  # an en dash
        ("\uff0d5", "-5"),
        ("-€5", "-5"),
        ("-$ 5", "-5"),
        ("- $5", "-5"),
        ("-US$5", "-5"),
        ("x = - 5", "-5"),
        ("it is - 5", "-5"),
        ("-**5**", "-5"),
        ("#### minus 5", "-5"),
        ("negative 5", "-5"),
        ("x - 5", "5"),
        ("12 minus 5", "5"),
        ("$20-$18", "18"),
        ("1990\u20132000", "2000"),
        ("it is--5", "5"),  # a dash
        ("50%-3", "3"),
        ("these:\n- 3\n- 5", "5"),  # a list
        # groups
        ("the sum is 1 000", "1000"),
        ("1 234 567.5", "1234567.5"),
        ("1\u202f000", "1000"),
        ("1\u00a0000", "1000"),
        ("#### 1 000 apples", "1000"),
        ("1_000", "1000"),
        ("1_00", "100"),
        ("1{,}000", "1000"),
        (r"10,\!000", "10000"),
        (r"1\,000\,000.5", "1000000.5"),
        ("12'000", "12000"),
        ("12\u2019000", "12000"),
        ("1,00,000", "100000"),
        ("12,34,567.5", "1234567.5"),
        ("1.000.000", "1000000"),
        ("1.234,50", "1234.5"),
        ("#### 12 345,67", "12345.67"),
        ("#### 3 1/2 cups", "7/2"),  # mixed numbers
        (r"-3\frac{1}{2}", "-7/2"),
        ("3½", "7/2"),
        ("½", "1/2"),
        ("1⅔", "5/3"),
        ("3 5/2", "5/2"),  # not mixed
        ("1 2 300", "300"),  # a list
        ("in 2020 100", "100"),
        ("1 0000", "0"),
    ],
    ids=lambda value: ascii(value[:20]) if value else "none",
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == (None if number is None else Fraction(number))


def test_the_limits_are_what_they_say():
    spaces = " " * (MAX_EXPRESSION - 3)
    assert evaluate_expression(f"3+{spaces}5") == (8, [3, 5])  # the last length that is read
    assert evaluate_expression(f"3+{spaces} 5") is None
    assert final_number("9" * MAX_EXPRESSION) == 10**MAX_EXPRESSION - 1
    assert final_number("9" * (MAX_EXPRESSION + 1)) is None
    assert final_number("7" + " " * (MAX_TEXT - 1)) == 7
    assert final_number("7" + " " * MAX_TEXT) is None


def test_a_numeric_answer_compares_values_not_spellings():
    completions = ["1200", "1,200.00", "$1200 ", "-1200", "1200.001", "none", "#### 1,200"]
    assert numeric_answer(["?"] * 7, completions, answer=["1,200"] * 7) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert numeric_answer(["?"] * 3, ["0.1", "-3", "4"], answer=[0.1, -3, "2+2=4 #### 4"]) == [1.0, 1.0, 1.0]
    fractions = ["#### 1/2", "0.5", "#### 1", "2"]
    assert numeric_answer(["?"] * 4, fractions, answer=["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_a_number_is_not_its_exponent_and_not_without_its_sign():
    assert numeric_answer(["?"] * 2, ["0.00001", "5"], answer=[1e-5] * 2) == [1.0, 0.0]
    assert numeric_answer(["?"] * 2, ["10000000000000000", "16"], answer=[1e16] * 2) == [1.0, 0.0]
    assert numeric_answer(["?"] * 2, ["6.02e23", "23"], answer=["6.02e23"] * 2) == [1.0, 0.0]
    assert numeric_answer(["?"] * 2, [r"#### -\$18", "#### - 5"], answer=["18", "5"]) == [0.0, 0.0]
    assert numeric_answer(["?"] * 2, [r"#### -\$18", "#### - 5"], answer=["-18", "-5"]) == [1.0, 1.0]


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, max_examples=50)
def test_every_float_is_read_back(x):
    assert final_number(f"x = {x}") == Fraction(str(x))


@pytest.mark.parametrize("separator", [",", " ", "\u00a0", "\u202f", "_", "'", "{,}", r"\,"])
@given(st.integers(-(10**12), 10**12))
@settings(deadline=None, max_examples=20)
def test_every_grouped_integer_is_read_back(separator, n):
    assert final_number(f"it is {n:,}.".replace(",", separator)) == n


@pytest.mark.parametrize("text", LONG_TEXT, ids=lambda text: ascii(text[:8]))
def test_no_text_takes_long_to_search(text):
    assert seconds(final_number, text) < 0.3
    assert seconds(exact_answer, ["?"], [text], ["7"]) < 0.3
    assert seconds(marked_answer, ["?"], [text]) < 0.3


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "so {:,}.", "#### {} and 3", "(9) = {:,}.00"]))
@settings(deadline=None, max_examples=50)
def test_every_integer_is_read_back(n, form):
    assert final_number(form.format(n)) == n


def test_an_answer_column_without_numbers_is_an_error():
    with pytest.raises(ValueError, match="answer column must hold numbers, got 'seven'"):
        numeric_answer(["?"], ["7"], answer=["seven"])


def test_an_exact_answer_ignores_only_the_spaces_at_its_ends():
    completions = ["4", " 4\n", "4.0", "44", "", "4 4"]
    assert exact_answer(["?"] * 6, completions, answer=[4, "4 ", "4", "4", "4", "4"]) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_format_must_match_the_whole_text_across_lines():
    reward = matches_format(r"<think>.*</think>\s*<answer>\d+</answer>")
    good = "<think>a\nb</think>\n<answer>4</answer>"
    completions = [good, f" {good}\n", f"so: {good}", f"{good}!", good.replace("4", "x"), ""]
    assert reward(["?"] * 6, completions, answer=["4"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: .*position 1"):
        matches_format("(")


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("#### 42", 1.0),
        ("6 * 7 = 42\n#### 42\n", 1.0),
        ("thus\n\n  \n#### -1,200.50", 1.0),
        ("#### x = 7", 1.0),  # the answer itself is not checked
        ("42", 0.0),
        ("It is #### 42", 0.0),  # not a line of its own
        ("#### 41\nno\n#### 42", 0.0),  # two answers
        ("#### 42\nas 6 * 7 = 42", 0.0),  # not the end
        ("##### 42", 0.0),
        ("### 42", 0.0),
        ("#### ", 0.0),
        ("#### ,", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_a_marked_answer_is_the_last_line_and_the_only_one(text, marked):
    assert marked_answer(["?"], [text], answer=["7"]) == [marked]
    assert marked_answer(["?"] * 2, [text, "#### 1"]) == [marked, 1.0]


def test_a_pattern_that_takes_too_long_scores_zero_with_a_warning():
    pattern = f"(a|aa)+$(?#{'x' * 99})"  # a long comment, of which the warning shows only the beginning
    said = r"the pattern '\(a\|aa\)\+\$\(\?#x{69}' .* 0\.5 s .* score 0\. .* nested repeats such as \(a\+\)\+\?$"
    with pytest.warns(RuntimeWarning, match=said):
        assert matches_format(pattern)(["?"] * 2, ["a" * 60 + "!", "aaa"]) == [0.0, 1.0]


def test_an_error_shows_only_the_beginning_of_a_long_text():
    with pytest.raises(ValueError, match=r"got 'x{60}'$"):
        countdown(["x" * 99], ["3"])
    with pytest.raises(ValueError, match=r"got 'x{60}'$"):
        numeric_answer(["?"], ["7"], answer=["x" * 99])
    with pytest.raises(ValueError, match=r"^'\({80}' is not"):
        matches_format("(" * 99)


@pytest.mark.parametrize("name", ["countdown", "exact_answer", "numeric_answer"])
def test_built_in_rewards_take_any_columns_and_refuse_lists_of_different_lengths(name):
    columns = {"answer": ["22", "7"], "difficulty": ["easy", "hard"]}
    first = 0.0 if name == "countdown" else 1.0  # 22 is the answer, but uses none of the numbers
    assert BUILT_IN[name]([PROMPT, "3,5,7:7="], ["22", "8"], **columns) == [first, 0.0]
    with pytest.raises(ValueError, match="argument 2 is"):
        BUILT_IN[name]([PROMPT], ["22", "8"], answer=["22"])
