"""The KL estimators against what they estimate, by enumerating a vocabulary of seven tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_lab.algorithm.kl import exact_kl, kl_estimate
from grpo_lab.algorithm.losses import importance_ratio

ALL = torch.ones(1, 7, dtype=torch.bool)
ESTIMATORS = ["k1", "k2", "k3"]


@pytest.fixture(params=[0.3, 3.0], ids=["near", "far"])
def pair(request):
    """Logits of a policy (with gradient) and a reference over seven tokens."""
    pi, ref = request.param * torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return pi.requires_grad_(), ref


def expectation(pi, ref, estimator, corrected=False):
    """Its value, and as gradient the expected gradient: tokens are drawn with probabilities that are held fixed."""
    logprobs, ref_logprobs = pi.log_softmax(-1)[None], ref.log_softmax(-1)[None]
    estimates = kl_estimate(logprobs, ref_logprobs, ALL, estimator=estimator)
    if corrected:
        estimates = estimates * importance_ratio(logprobs, logprobs.detach(), ALL)
    return (logprobs.detach().exp() * estimates).sum()


def gradient(value, pi):
    return torch.autograd.grad(value, pi)[0]


def test_the_exact_kl_by_hand_and_by_loop(pair):
    half, quarter = torch.tensor([1.0, 1.0]).log(), torch.tensor([1.0, 3.0]).log()
    # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = 1/2 log(4/3); the other way: 1/4 log(1/2) + 3/4 log(3/2)
    assert exact_kl(half, quarter).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert exact_kl(quarter, half).item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    p, q = ([math.exp(z) / sum(map(math.exp, v)) for z in v] for v in (pair[0].tolist(), pair[1].tolist()))
    by_loop = sum(p[v] * math.log(p[v] / q[v]) for v in range(7))
    assert exact_kl(*(z.expand(2, 3, 7) for z in pair)).flatten().tolist() == pytest.approx([by_loop] * 6)


def test_the_exact_kl_of_forbidden_tokens():
    inf = torch.inf
    pi = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0]], requires_grad=True)
    kl = exact_kl(pi, torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, -inf]]))
    assert kl.tolist() == [0.0, inf]  # 0 log 0 counts as 0; infinite where pi allows what ref forbids
    assert gradient(kl[0], pi)[0].isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # d = log pi - log ref = 1, -2, 0: d; d^2 / 2; exp(-d) - 1 + d
    [("k1", [1.0, -2.0, 0.0]), ("k2", [0.5, 2.0, 0.0]), ("k3", [math.exp(-1), math.exp(2) - 3, 0.0])],
)
def test_each_estimator_by_hand(estimator, expected):
    logprobs, ref_logprobs = torch.tensor([[-1.0, -4.0, -1.5]]), torch.tensor([[-2.0, -2.0, -1.5]])
    assert_close(kl_estimate(logprobs, ref_logprobs, ALL[:, :3], estimator=estimator), torch.tensor([expected]))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_on_average_the_kl(pair, estimator):
    assert_close(expectation(*pair, estimator), exact_kl(*pair), rtol=1e-12, atol=1e-12)


def test_k2_is_on_average_only_nearly_the_kl(pair):
    error = (expectation(*pair, "k2") / exact_kl(*pair) - 1).abs()
    assert error > 1e-3
    assert error < 0.2 or exact_kl(*pair) > 1  # good for a near pair only


@pytest.mark.parametrize(
    ("estimator", "corrected", "what_it_descends"),
    [
        ("k1", False, lambda pi, ref: (0 * pi).sum()),  # useless as a loss term
        ("k2", False, exact_kl),
        ("k3", False, lambda pi, ref: exact_kl(ref, pi)),  # the KL the other way round
        ("k1", True, exact_kl),  # multiplied by the importance ratio, both are right
        ("k3", True, exact_kl),
    ],
)
def test_the_expected_gradient_of_each_estimator(pair, estimator, corrected, what_it_descends):
    pi, ref = pair
    result = gradient(expectation(pi, ref, estimator, corrected), pi)
    assert_close(result, gradient(what_it_descends(pi, ref), pi), rtol=1e-12, atol=1e-12)


def test_the_two_directions_of_the_kl_pull_differently(pair):  # or the test above could not tell them apart
    pi, ref = pair
    forward, backward = gradient(exact_kl(pi, ref), pi), gradient(exact_kl(ref, pi), pi)
    assert (forward - backward).norm() > 0.05 * forward.norm()


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=7, max_size=7))
@settings(deadline=None, max_examples=50)
def test_k2_and_k3_are_never_negative_and_zero_only_without_a_move(pairs):
    logprobs, ref_logprobs = torch.tensor(pairs).T[:, None]
    for estimator in ("k2", "k3"):
        estimates = kl_estimate(logprobs, ref_logprobs, ALL, estimator=estimator)
        assert (estimates >= 0).all()
        assert (estimates[(logprobs - ref_logprobs).abs() > 1e-3] > 0).all()
        assert (kl_estimate(logprobs, logprobs, ALL, estimator=estimator) == 0).all()


def test_k3_keeps_its_digits_near_zero():
    tiny = kl_estimate(torch.zeros(1, 1), torch.full((1, 1), 1e-3), ALL[:, :1])
    assert tiny.item() == pytest.approx(1e-6 / 2, rel=1e-3)  # x^2 / 2 for small x; exp(x) - 1 - x is 5% off here


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rubbish", [-torch.inf, torch.inf, torch.nan, -1e30])
def test_padding_cannot_leak(estimator, rubbish):
    mask = torch.tensor([[True, True, False]])
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-2.0, -1.5, 0.0]])[:, None]
    clean, dirty = (logprobs.masked_fill(~mask, fill).requires_grad_() for fill in (0.0, rubbish))
    for policy, reference in ((clean, ref_logprobs), (dirty, ref_logprobs.masked_fill(~mask, -rubbish))):
        kl_estimate(policy, reference, mask, estimator=estimator).sum().backward()
    assert torch.equal(dirty.grad, clean.grad)
    assert dirty.grad[0, 2] == 0
    value = kl_estimate(dirty, ref_logprobs.masked_fill(~mask, -rubbish), mask, estimator=estimator)
    assert torch.equal(value, kl_estimate(clean, ref_logprobs, mask, estimator=estimator))
    assert value[0, 2] == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_reference_gets_no_gradient(estimator):
    reference = torch.zeros(1, 7, requires_grad=True)
    assert not kl_estimate(torch.ones(1, 7), reference, ALL, estimator=estimator).requires_grad


def test_k3_is_the_default_and_errors_say_what_was_expected():
    logprobs = torch.randn(1, 7)
    assert torch.equal(
        kl_estimate(logprobs, 0 * logprobs, ALL), kl_estimate(logprobs, 0 * logprobs, ALL, estimator="k3")
    )
    for wrong in ("k4", "K3"):  # in a dictionary, one stands after the right names and one before
        with pytest.raises(ValueError, match=rf'"k1", "k2" or "k3", got \'{wrong}\''):
            kl_estimate(logprobs, logprobs, ALL, estimator=wrong)
    with pytest.raises(ValueError, match=r"one shape \[B, T\], got \[1, 7\], \[1, 1\] and \[1, 7\]"):
        kl_estimate(logprobs, logprobs[:, :1], ALL)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("T", [1, 9])
def test_one_argument_of_another_shape_is_refused(T, position):
    arguments = [torch.zeros(1, 7), torch.zeros(1, 7), ALL]
    arguments[position] = torch.ones(1, T, dtype=arguments[position].dtype)
    with pytest.raises(ValueError, match="must share one shape"):
        kl_estimate(*arguments)


def test_the_estimator_is_given_by_name():
    with pytest.raises(TypeError, match="takes 3 positional arguments"):
        kl_estimate(*[ALL] * 4)
