"""The engine: what a judge says of unfinished, broken and wrong functions, and how a verdict looks."""

import inspect
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_lab import checks
from grpo_lab.algorithm.logprobs import truncate
from grpo_lab.algorithm.losses import clipped_surrogate
from grpo_lab.course.checks import Judge, Verdict
from grpo_lab.rewards import verifiable as rewards

JUDGES = {name: judge for name, judge in vars(checks).items() if isinstance(judge, Judge)}


def test_every_judge_has_its_name_and_its_tests():
    assert all(repr(judge).startswith(name + "(") for name, judge in JUDGES.items())
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert JUDGES.keys() == set(re.findall(r"^    judge = checks\.(\w+)$", tests, re.MULTILINE))


# those two inherit what may not apply
@pytest.mark.parametrize("name", sorted(JUDGES.keys() - {"grpo_loss", "training_step"}))
def test_each_diagnosis_is_told_apart_from_the_others(name):
    judge = JUDGES[name]
    for sentence, version in judge.diagnoses.items():

        def whatever_it_is_given(*inputs, version=version, **settings):
            taken = inspect.signature(version).parameters
            takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
            return version(*inputs, **{k: v for k, v in settings.items() if takes_all or k in taken})

        verdict = judge(whatever_it_is_given)
        assert verdict.message == f"{sentence}.", verdict


def test_the_smallest_failing_input_is_shown():
    def without_the_linear_term(logprobs, ref_logprobs, mask):
        return ((ref_logprobs - logprobs).where(mask, 0.0).exp() - 1).where(mask, 0.0)

    verdict = checks.kl_estimate(without_the_linear_term)
    assert verdict.inputs == {"logprobs": "[[-0.6931]]", "ref_logprobs": "[[-0.6931]]", "mask": "[[True]]"}
    assert verdict.compared == {"expected gradient": "[[0]]", "got gradient": "[[-1]]"}


def test_numbers_that_look_alike_are_shown_with_more_digits():
    verdict = checks.aggregate(lambda values, mask: values.mean() * 1.0002)
    assert verdict.compared == {"expected": "3", "got": "3.001"}
    verdict = checks.aggregate(lambda values, mask: values.mean() * 1.00012)
    assert verdict.compared == {"expected": "3", "got": "3.00036"}


# --- Settings


def test_settings_are_tried_only_if_the_function_takes_them():
    verdict = checks.clipped_surrogate(lambda new, old, A, mask: clipped_surrogate(new, old, A, mask))
    assert verdict.message == "all 8 cases are right (without clip_range)."
    verdict = checks.truncate(lambda logits, top_k: truncate(logits, top_k=top_k))
    assert verdict.message == "all 4 cases are right (without temperature, top_p)."


@pytest.mark.parametrize(
    ("judge", "fn", "message"),
    [
        (checks.truncate, lambda logits: logits, "your function takes no temperature and no top_k and no top_p."),
        (checks.grpo_loss, lambda *inputs, ref_logprobs: 0.0, "your function takes no clip_range and no kl_coef."),
        (checks.kl_estimate, lambda logprobs: logprobs, "your function raises TypeError: "),
        (checks.kl_estimate, lambda p, q, m, beta: p, "your function raises TypeError: "),
        (
            checks.kl_estimate,
            torch.ones(2),
            "pass the function itself, without calling it; got Tensor.",
        ),
        (checks.kl_estimate, None, "pass the function itself, without calling it; got NoneType."),
        (checks.kl_estimate, len, "your function raises TypeError: "),
    ],
)
def test_a_function_that_cannot_be_asked(judge, fn, message):
    verdict = judge(fn)
    assert not verdict
    assert verdict.message.startswith(message)


# --- Stubs, and what breaks


def raises(error):
    def fn(*inputs, **settings):
        raise error

    return fn


@pytest.mark.parametrize("name", JUDGES)
def test_a_stub_is_not_written_yet(name):
    def unfinished(*inputs, **settings):
        """Your turn."""

    for stub in (
        unfinished,
        lambda *i, **s: ...,
        raises(NotImplementedError),
        raises(NotImplementedError("your turn")),
    ):
        verdict = JUDGES[name](stub)
        assert not verdict
        assert (verdict.state, verdict.message) == ("to do", "not written yet.")
        assert verdict.hint == repr(JUDGES[name])


def test_a_function_that_is_half_written():
    verdict = checks.aggregate(lambda values, mask: values.mean() if len(values) < 2 else None)
    assert verdict.state == "not yet"
    assert verdict.message.startswith("your function returns nothing here. What must hold: two full rows")
    assert verdict.compared == {"expected": "3.75"}


@pytest.mark.parametrize("name", JUDGES)
def test_an_exception_becomes_a_verdict(name):
    verdict = JUDGES[name](raises(KeyError("loss")))
    assert (verdict.state, verdict.message) == ("not yet", "your function raises KeyError: 'loss'")
    assert verdict.inputs
    assert JUDGES[name](raises(AssertionError())).message == "your function raises AssertionError."
    unsupported = NotImplementedError("\"log_softmax\" not implemented for 'Long'")  # PyTorch's, not a stub's
    assert JUDGES[name](raises(unsupported)).message.startswith("your function raises NotImplementedError: ")


@pytest.mark.parametrize("name", sorted(JUDGES.keys() - {"training_step"}))  # what that one returns is free
@pytest.mark.parametrize(
    "answer",
    ["text", {"a": 1}, object(), [[1.0], [2.0, 3.0]], [None], [], torch.zeros(7, 7), torch.zeros(0), 1j, float("nan"),
     torch.tensor([[True]]), iter([1.0]), np.zeros((3, 3)), torch.zeros(1, 1, dtype=torch.complex64),
     torch.zeros(2, 2).to_sparse()],
    ids=lambda answer: type(answer).__name__,
)  # fmt: skip
def test_whatever_comes_back_is_answered(name, answer):
    verdict = JUDGES[name](lambda *inputs, **settings: answer)
    assert verdict.state == "not yet"
    assert repr(verdict)
    assert verdict._repr_html_()


def test_types_that_lose_digits_are_named():
    def in_half(logits, tokens):
        return checks.token_logprobs.reference(logits, tokens).bfloat16()

    message = checks.token_logprobs(in_half).message
    assert message == "your answer has the type torch.bfloat16, expected torch.float32."
    verdict = checks.reward(lambda p, c: torch.tensor(rewards.countdown(p, c)).long())
    assert verdict.message == "your answer has the type torch.int64, expected torch.float32."


def test_what_is_not_finite_is_named():
    def unsafe(values, mask):
        return values[mask].mean() if len(mask) > 1 else values.mean() * math.inf

    assert checks.aggregate(unsafe).message.startswith("your answer is not finite. What must hold: one full row")


def test_the_learners_surroundings_do_not_matter_and_are_left_alone(capsys):
    state = torch.get_rng_state()
    with torch.no_grad():
        assert checks.clipped_surrogate(clipped_surrogate)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")  # the verdict is returned: printing it too would show it twice


def test_judging_twice_gives_the_same_verdict():
    def in_place(logits, top_k=0):
        return logits.masked_fill_(logits < logits.topk(min(top_k, logits.shape[-1]) or 1).values[..., -1:], -torch.inf)

    first = checks.truncate(in_place)
    assert first.message == "you change an input in place: make a new tensor instead."
    assert repr(first) == repr(checks.truncate(in_place))
    assert checks.truncate(truncate)


# --- How it looks


def inverted(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).where(mask, 0.0).exp() * advantages[:, None]
    clipped = (logprobs - old_logprobs).where(mask, 0.0).exp().clamp(0.8, 1.2) * advantages[:, None]
    return torch.where(advantages[:, None] < 0, ratio.maximum(clipped), ratio.minimum(clipped)).where(mask, 0.0)


def test_the_text():
    assert str(checks.clipped_surrogate(inverted)).splitlines() == [
        "[not yet] clipped_surrogate: your clip is inverted where the advantage is negative.",
        "    logprobs      [[-0.6931]]",
        "    old_logprobs  [[-1.386]]",
        "    advantages    [-1]",
        "    mask          [[True]]",
        "    expected      [[-2]]    got  [[-1.2]]",
        "    hint          " + checks.clipped_surrogate.hint,
    ]
    verdict = checks.clipped_surrogate(clipped_surrogate)
    assert str(verdict) == "[ok] clipped_surrogate: all 9 cases are right."


def test_long_values_stand_below_each_other():
    verdict = Verdict("f", "not yet", "wrong.", compared={"expected": "1" * 60, "got": "2" * 60})
    assert str(verdict).splitlines()[1:] == [f"    expected  {'1' * 60}", f"    got       {'2' * 60}"]


class Tags(HTMLParser):
    """Fails on tags that do not match; keeps the text and the attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_html_of_a_notebook():
    page = Tags(checks.clipped_surrogate(inverted)._repr_html_())
    assert page.attributes[0] == ("div", {"role": "status", "style": "border-left:4px solid #d55e00;padding:4px 10px"})
    assert page.texts[:2] == [
        "[not yet] clipped_surrogate",
        ": your clip is inverted where the advantage is negative.",
    ]
    assert page.texts[-5:] == ["expected", "got", "[[-2]]", "[[-1.2]]", checks.clipped_surrogate.hint]
    assert [a.get("scope") for tag, a in page.attributes if tag == "th"] == ["row"] * 4 + ["col"] * 2


def test_the_state_is_said_in_words_and_colours_that_everyone_tells_apart():
    states = {"ok": clipped_surrogate, "not yet": inverted, "to do": lambda *inputs: None}
    for state, fn in states.items():
        verdict = checks.clipped_surrogate(fn)
        assert Tags(verdict._repr_html_()).texts[0] == f"[{state}] clipped_surrogate"
        assert checks.COLOURS[state] in verdict._repr_html_()
        assert "\x1b" not in verdict._repr_html_() + repr(verdict)
    assert len(set(checks.COLOURS.values())) == 3


def test_what_a_learner_raises_cannot_become_html():
    verdict = checks.reward(raises(ValueError("<script>alert(1)</script>")))
    assert "<script>" in repr(verdict)
    assert "<script>" not in verdict._repr_html_()
