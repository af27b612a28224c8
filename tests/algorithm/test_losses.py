"""The loss: gradients in every region of the clip, against a plain loop, and under changes that must not matter."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_lab.algorithm.losses import (
    aggregate,
    cispo_surrogate,
    clipped_surrogate,
    grpo_loss,
    importance_ratio,
    sampler_weights,
)

HOW = ["sequence-mean", "token-mean", "constant"]
IMPORTANCE = ["token", "sequence"]
SURROGATES = ["clip", "cispo"]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)


def make(seed=0):
    """Log-probabilities under the policy, the old policy and the reference, and advantages of both signs."""
    random = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    old = -3 * random[0].abs()
    return (old + 0.4 * random[1]).requires_grad_(), old, old + 0.4 * random[2], random[3, :, 0]


def loss_by_loop(logprobs, old, ref, advantages, mask, *, beta, estimator, low, high, importance, surrogate, how):
    """The definition in Python floats, one token at a time; constant = 6."""
    rows = []
    for lp, lo, lr, A, m in zip(*(x.tolist() for x in (logprobs, old, ref, advantages, mask)), strict=True):
        real = [t for t, on in enumerate(m) if on]
        row = []
        for t in real:
            over = [t] if importance == "token" else real
            c = math.exp(sum(lp[u] - lo[u] for u in over) / len(over))
            a = A[t] if isinstance(A, list) else A
            if surrogate == "clip":
                gain = min(c * a, min(max(c, 1 - low), 1 + high) * a)
            else:
                gain = min(c, 1 + high) * a * lp[t]
            d = lp[t] - lr[t]
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
            row.append(-gain + beta * kl)
        rows.append(row)
    if how == "sequence-mean":
        return sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)
    everything = sum(map(sum, rows))
    return everything / sum(map(len, rows)) if how == "token-mean" else everything / (len(rows) * 6)


@pytest.mark.parametrize("per_token", [False, True], ids=["A[B]", "A[B,T]"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_the_loss_equals_a_plain_loop(importance, surrogate, how, per_token):
    logprobs, old, ref, advantages = make()
    if per_token:
        advantages = advantages[:, None] * torch.tensor([1.0, 0.5, -2.0, 3.0], dtype=torch.float64)
    options = {"importance": importance, "surrogate": surrogate}
    for estimator in ("k1", "k2", "k3"):
        terms = grpo_loss(
            logprobs, old, advantages, MASK, ref_logprobs=ref, kl_coef=0.3, kl_estimator=estimator,
            clip_range=0.1, clip_range_high=0.25, aggregation=how, constant=6, **options,
        )  # fmt: skip
        expected = loss_by_loop(
            logprobs, old, ref, advantages, MASK, beta=0.3, estimator=estimator, low=0.1, high=0.25, how=how, **options
        )
        assert terms.loss.item() == pytest.approx(expected, abs=1e-12)
        assert torch.equal(terms.ratio, importance_ratio(logprobs, old, MASK, importance))


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("high", [None, 0.5])
@pytest.mark.parametrize("ratio", [0.7, 0.9, 1.0, 1.1, 1.3, 1.6])
@pytest.mark.parametrize("A", [2.0, 0.5, 0.0, -0.5, -2.0])
def test_the_clip_stops_only_what_has_gone_far_enough(A, ratio, high, importance):
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    mask, old = torch.tensor([[True]]), torch.zeros(1, 1)
    options = {"clip_range_high": high, "importance": importance}  # clip_range is 0.2 by default
    value = clipped_surrogate(logprobs, old, torch.tensor([A]), mask, **options)
    value.sum().backward()
    top = 1.2 if high is None else 1.5
    stopped = ratio > top if A > 0 else ratio < 0.8
    assert logprobs.grad.item() == pytest.approx(0.0 if stopped else ratio * A)  # d(c A) / d log pi = c A
    assert value.item() == pytest.approx(A * ((top if A > 0 else 0.8) if stopped else ratio))
    terms = grpo_loss(logprobs, old, torch.tensor([A]), mask, **options)
    assert terms.clipped_high.item() == (stopped and A > 0)
    assert terms.clipped_low.item() == (stopped and A < 0)
    assert terms.ratio.item() == pytest.approx(ratio)


@pytest.mark.parametrize("A", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.1, 0.1), (1.0, 1.0), (1.2, 1.2), (1.4, 1.3), (5.0, 1.3)])
def test_cispo_caps_the_weight_and_leaves_every_token_a_gradient(A, ratio, weight):
    logprobs, mask = torch.tensor([[-0.5]], requires_grad=True), torch.tensor([[True]])
    old = logprobs.detach() - math.log(ratio)
    value = cispo_surrogate(logprobs, old, torch.tensor([A]), mask, clip_range_high=0.3)
    value.sum().backward()
    assert value.item() == pytest.approx(weight * A * -0.5)
    assert logprobs.grad.item() == pytest.approx(weight * A)
    terms = grpo_loss(logprobs, old, torch.tensor([A]), mask, clip_range_high=0.3, surrogate="cispo")
    assert (terms.clipped_low.item(), terms.clipped_high.item()) == (False, ratio > 1.3)


def test_the_sequence_ratio_is_the_geometric_mean_over_the_completion():
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    logprobs = torch.tensor([[0.1, 0.5, -0.3, 99.0], [9.0] * 4], requires_grad=True)
    ratio = importance_ratio(logprobs, torch.zeros(2, 4), mask, "sequence")
    assert_close(ratio, torch.tensor([[math.exp(0.1)], [1.0]]))  # (0.1 + 0.5 - 0.3) / 3; an empty row has not moved
    ratio.sum().backward()
    assert_close(logprobs.grad[0], torch.tensor([1.0, 1.0, 1.0, 0.0]) * math.exp(0.1) / 3)
    assert importance_ratio(logprobs, torch.zeros(2, 4), mask)[~mask].eq(1).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("old", ["none", "equal"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(old, importance, surrogate, how):
    logprobs, _, _, advantages = make()
    before = None if old == "none" else logprobs.detach().clone()
    options = {"importance": importance, "surrogate": surrogate, "aggregation": how, "constant": 8}
    terms = grpo_loss(logprobs, before, advantages, MASK, **options)
    terms.loss.backward()
    lengths = MASK.sum(1, keepdim=True).clamp(min=1)  # 4, 2, 1, 3, (0): 10 tokens, 5 completions
    share = {"sequence-mean": 1 / (5 * lengths), "token-mean": 1 / 10, "constant": 1 / (5 * 8)}[how]
    assert_close(logprobs.grad, -advantages[:, None] * MASK * share)
    assert (terms.ratio == 1).all()
    assert not (terms.clipped_low | terms.clipped_high).any()


def test_the_weight_of_each_completion():
    values = torch.ones(2, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    shares = {}
    for how in HOW:
        (grad,) = torch.autograd.grad(aggregate(values, mask, how, constant=8), values)
        shares[how] = grad.sum(1).tolist()
        assert grad[~mask].eq(0).all()
    assert shares == {
        "sequence-mean": [0.5, 0.5],  # each completion the same, so each token of the long one a quarter
        "token-mean": pytest.approx([0.8, 0.2]),  # each of 5 tokens the same
        "constant": [0.25, 0.0625],  # 4 / (2 * 8) and 1 / (2 * 8): the other's length plays no part
    }


@pytest.mark.parametrize("how", HOW)
def test_an_empty_row_counts_as_zero_and_an_empty_batch_gives_zero(how):
    ones = torch.full((2, 3), 6.0)
    mask = torch.tensor([[True, True, True], [False] * 3])
    # one full row of two: its mean 6, halved; 3 tokens of 6; 18 / (2 * 3)
    expected = {"sequence-mean": 3.0, "token-mean": 6.0, "constant": 3.0}[how]
    assert aggregate(ones, mask, how, constant=3).item() == expected
    assert aggregate(ones[:1, :1], mask[:1, :1], how, constant=1).item() == 6.0  # one token is its own mean
    assert aggregate(ones * torch.nan, mask & False, how, constant=3).item() == 0.0
    assert aggregate(ones[:0], mask[:0], how, constant=3).item() == 0.0


@given(cut=st.integers(1, 4), seed=st.integers(0, 99), importance=st.sampled_from(IMPORTANCE), how=st.sampled_from(HOW))
@settings(deadline=None, max_examples=40)
def test_micro_batches_add_up_to_the_whole_and_rows_may_change_places(cut, seed, importance, how):
    logprobs, old, ref, advantages = make(seed)

    def loss_and_gradient(rows, total):
        loss = grpo_loss(
            logprobs[rows], old[rows], advantages[rows], MASK[rows], ref_logprobs=ref[rows], kl_coef=0.1,
            importance=importance, aggregation=how, constant=8, total=total,
        ).loss  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss, logprobs)[0]

    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    total = 10 if how == "token-mean" else 5  # tokens, or completions
    whole, shuffled = loss_and_gradient(slice(None), None), loss_and_gradient(order, None)
    parts = [loss_and_gradient(rows, total) for rows in (order[:cut], order[cut:])]
    for expected, one, two, again in zip(whole, *parts, shuffled, strict=True):
        assert_close(one + two, expected)
        assert_close(again, expected)
    as_tensor = loss_and_gradient(order[:cut], torch.tensor(total))  # as it arrives from a sum over processes
    assert_close(as_tensor, parts[0])


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, -1e4])
def test_padding_cannot_leak(rubbish, importance, surrogate):
    results = []
    for fill in (0.0, rubbish):
        logprobs, old, ref, advantages = make()
        dirty = logprobs.detach().masked_fill(~MASK, fill).requires_grad_()
        terms = grpo_loss(
            dirty, old.masked_fill(~MASK, -fill), advantages, MASK, ref_logprobs=ref.masked_fill(~MASK, 2 * fill),
            kl_coef=0.1, importance=importance, surrogate=surrogate, aggregation="token-mean",
        )  # fmt: skip
        terms.loss.backward()
        assert dirty.grad[~MASK].eq(0).all()
        results.append((terms.loss, dirty.grad, terms.kl, terms.ratio, terms.clipped_low, terms.clipped_high))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_the_kl_term_pulls_towards_the_reference_and_beta_scales_its_gradient():
    logprobs, old, ref, advantages = make()

    def gradient(**options):
        return torch.autograd.grad(grpo_loss(logprobs, old, advantages, MASK, **options).loss, logprobs)[0]

    without = gradient()
    pull, double = (gradient(ref_logprobs=ref, kl_coef=beta) - without for beta in (0.1, 0.2))
    assert_close(double, 2 * pull)
    assert (pull.sign() == (logprobs - ref).sign() * MASK).all()  # descending brings log pi nearer to log ref
    for loss_of in (gradient, lambda **options: grpo_loss(logprobs, old, advantages, MASK, **options).loss):
        watched = loss_of(ref_logprobs=ref - torch.inf, kl_coef=0.0)  # the reference forbids it: KL is infinite
        assert torch.equal(watched, loss_of())  # beta = 0: reported, not added


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_ratio_on_the_edge_is_not_clipped(surrogate):
    logprobs, _, _, advantages = make()
    # c = 1 = 1 - eps = 1 + eps
    terms = grpo_loss(logprobs, None, advantages, MASK, clip_range=0.0, surrogate=surrogate)
    assert not (terms.clipped_low | terms.clipped_high).any()


def test_a_surrogate_is_zero_where_nothing_was_sampled():
    logprobs, old, _, advantages = make()
    assert clipped_surrogate(logprobs, old, advantages, MASK)[~MASK].eq(0).all()
    assert cispo_surrogate(logprobs, old, advantages, MASK, clip_range_high=0.2)[~MASK].eq(0).all()


def test_the_defaults_are_the_papers_token_ratio_and_sequence_mean():
    logprobs, old, _, advantages = make()
    surrogate = clipped_surrogate(logprobs, old, advantages, MASK)
    assert torch.equal(surrogate, clipped_surrogate(logprobs, old, advantages, MASK, importance="token"))
    assert torch.equal(aggregate(surrogate, MASK), aggregate(surrogate, MASK, "sequence-mean"))
    assert torch.equal(grpo_loss(logprobs, old, advantages, MASK).loss, -aggregate(surrogate, MASK))


@pytest.mark.parametrize(
    ("function", "tensors"), [(clipped_surrogate, 4), (cispo_surrogate, 4), (aggregate, 3), (grpo_loss, 4)]
)
def test_settings_are_given_by_name(function, tensors):
    with pytest.raises(TypeError, match=f"{tensors} positional arguments but {tensors + 1}"):
        function(*[MASK] * (tensors + 1))


def test_only_the_loss_carries_gradient():
    logprobs, old, ref, advantages = make()
    old.requires_grad_(), ref.requires_grad_()
    terms = grpo_loss(logprobs, old, advantages, MASK, ref_logprobs=ref, kl_coef=0.1)
    terms.loss.backward()
    assert old.grad is None
    assert ref.grad is None
    assert not any(t.requires_grad for t in (terms.kl, terms.ratio, terms.clipped_low, terms.clipped_high))
    assert terms.kl[~MASK].eq(0).all()
    assert grpo_loss(logprobs, old, advantages, MASK).kl is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        terms.loss = terms.ratio


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": 0.1}, r"kl_coef is 0.1, so ref_logprobs is needed.*kl_coef=0"),
        (
            {"aggregation": "constant"},
            r'^aggregation "constant" needs its constant, in tokens: usually max_new_tokens$',
        ),
        # names that a dictionary would put before and after the right ones
        ({"aggregation": "Mean"}, r'"sequence-mean", "token-mean" or "constant", got \'Mean\''),
        ({"aggregation": "mean"}, r'"sequence-mean", "token-mean" or "constant", got \'mean\''),
        ({"aggregation": "sequence_mean"}, r'"sequence-mean", "token-mean" or "constant", got \'sequence_mean\''),
        ({"aggregation": "token_mean"}, r'"sequence-mean", "token-mean" or "constant", got \'token_mean\''),
        ({"importance": "Token"}, r'"token" or "sequence", got \'Token\''),
        ({"importance": "word"}, r'"token" or "sequence", got \'word\''),
        ({"surrogate": "PPO"}, r'"clip" or "cispo", got \'PPO\''),
        ({"surrogate": "ppo"}, r'"clip" or "cispo", got \'ppo\''),
    ],
)
def test_an_error_says_what_came_and_the_cure(options, message):
    logprobs, old, _, advantages = make()
    with pytest.raises(ValueError, match=message):
        grpo_loss(logprobs, old, advantages, MASK, **options)


# --- completions that another program sampled -----------------------------------------------------------------------

# All completions of at most two tokens over three ids, of which 0 ends them; padding is NaN.
EVERYTHING = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
WRITTEN = torch.tensor([[True, len(tokens) == 2] for tokens in EVERYTHING])


def tables(*seeds, spread=1.0):
    """Policies as logits [4, 3]: for the first token, and for the second after each first token."""
    return [spread * torch.randn(4, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


def scored(policy):
    """[7, 2] the log-probability of each token of each completion."""
    log_p = policy.log_softmax(-1)
    rows = [[log_p[0, t[0]], log_p[1 + t[0], t[1]] if len(t) == 2 else torch.tensor(torch.nan)] for t in EVERYTHING]
    return torch.stack([torch.stack([x.double() for x in row]) for row in rows])


def probabilities(policy):
    return scored(policy).where(WRITTEN, 0.0).sum(1).exp()


def expected_gradient(policy, drawn_from, weights=None, **options):
    """Return the exact expected gradient of the loss: every completion, weighted by its probability."""
    policy = policy.clone().requires_grad_()
    logprobs, ref = scored(policy), scored(tables(9)[0])
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3, 0.0, -2.0], dtype=torch.float64)
    loss = 0.0
    for i, p in enumerate(probabilities(drawn_from).tolist()):
        row = slice(i, i + 1)
        terms = grpo_loss(
            logprobs[row], None, advantages[row], WRITTEN[row], ref_logprobs=ref[row], kl_coef=0.3, total=1.0,
            weights=None if weights is None else weights[row], **options,
        )  # fmt: skip
        loss = loss + p * terms.loss
    (gradient,) = torch.autograd.grad(loss, policy)
    return gradient


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_sequence_weights_turn_the_samplers_gradient_into_the_policys(how, surrogate):
    policy, sampler = tables(0, 1)
    options = {"aggregation": how, "constant": 2, "surrogate": surrogate, "clip_range_high": 1.0}
    wanted = expected_gradient(policy, policy, **options)

    def off(correction, cap):
        weights = sampler_weights(scored(policy), scored(sampler), WRITTEN, correction=correction, cap=cap)
        return (expected_gradient(policy, sampler, weights, **options) - wanted).abs().max().item()

    uncorrected = (expected_gradient(policy, sampler, **options) - wanted).abs().max().item()
    assert off("sequence", math.inf) < 1e-14
    assert off("sequence", 1.0) > 1e-2  # the cap adds bias
    assert 1e-2 < off("token", math.inf) < uncorrected


def test_token_weights_are_unbiased_for_completions_of_one_token():
    policy, sampler = tables(0, 1)
    one = torch.tensor([[True], [True], [True]])
    ours, theirs = (p[0].log_softmax(-1)[:, None] for p in (policy, sampler))
    weights = sampler_weights(ours, theirs, one, correction="token", cap=math.inf)
    values = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    assert (theirs.exp() * weights).squeeze(1) @ values == pytest.approx((ours.exp().squeeze(1) @ values).item())


def test_the_weights_of_a_sampler_by_hand():
    #           row 0: 0.6 / 0.5 = 1.2, 0.3 / 0.6 = 0.5     row 1: 0.9 / 0.3 = 3, padding
    ours = torch.tensor([[0.6, 0.3], [0.9, torch.nan]]).log()
    theirs = torch.tensor([[0.5, 0.6], [0.3, torch.nan]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    by_token = sampler_weights(ours, theirs, mask, correction="token", cap=2.5)
    assert_close(by_token, torch.tensor([[1.2, 0.5], [2.5, 1.0]]))
    assert_close(sampler_weights(ours, theirs, mask, cap=2.5), torch.tensor([[0.6], [2.5]]))
    assert_close(sampler_weights(ours, theirs, mask), torch.tensor([[0.6], [2.0]]))
    with pytest.raises(ValueError, match='correction must be "sequence" or "token"'):
        sampler_weights(ours, theirs, mask, correction="batch")


@pytest.mark.parametrize("correction", ["sequence", "token"])
def test_weights_carry_no_gradient_stay_finite_and_are_one_where_both_agree(correction):
    logprobs, old, ref, advantages = make()
    weights = sampler_weights(logprobs, old, MASK, correction=correction)
    assert not weights.requires_grad
    far = sampler_weights(torch.zeros(5, 4), torch.full((5, 4), -9999.0), MASK, correction=correction)
    assert far.max() == 2
    assert torch.isfinite(far).all()
    equal = sampler_weights(logprobs, logprobs, MASK, correction=correction)
    assert torch.equal(equal, torch.ones_like(equal))
    plain = grpo_loss(logprobs, old, advantages, MASK, ref_logprobs=ref, kl_coef=0.3).loss
    assert grpo_loss(logprobs, old, advantages, MASK, ref_logprobs=ref, kl_coef=0.3, weights=equal).loss == plain
    halved = grpo_loss(logprobs, old, advantages, MASK, ref_logprobs=ref, kl_coef=0.3, weights=equal / 2).loss
    assert halved.item() == pytest.approx(plain.item() / 2)
