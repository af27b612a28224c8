"""Truncation, log-probabilities and entropies, against plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_lab.algorithm.logprobs import token_entropies, token_logprobs, truncate

# token:           0    1    2    3
LOGITS = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()


def kept_by_loop(logits, temperature, top_k, top_p):
    """The definition, one token at a time: the set of ids that may be drawn, and their log-probabilities."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])[: top_k or len(logits)]
    weights = {v: math.exp(logits[v] / temperature) for v in order}
    mass, kept = 0.0, []
    for v in order:
        if not kept or mass < top_p:
            kept.append(v)
        mass += weights[v] / sum(weights.values())
    return {v: math.log(weights[v] / sum(weights[u] for u in kept)) for v in kept}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 1}, [1]),
        ({"top_p": 0.65}, [1, 3]),  # 0.4 + 0.3 reaches 0.65
        ({"top_p": 0.75}, [1, 3, 0]),  # 0.7 does not reach 0.75: the token that crosses the line is kept
        ({"top_p": 0.0}, [1]),  # the most likely is always kept
        ({"top_k": 2, "top_p": 0.5}, [1]),  # 0.4 / (0.4 + 0.3) = 0.57: top-k first, then renormalise
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.5, "temperature": 0.5}, [1]),  # squares: 0.16 / 0.30 = 0.53: temperature comes first
        ({"top_p": 0.65, "temperature": 100.0}, [1, 3, 0]),  # nearly uniform: 3 of 4 needed
    ],
)
def test_truncate_returns_the_most_likely_first(settings, expected):
    assert truncate(LOGITS[None], **settings).tolist() == [expected]


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 4}, {"top_k": 99}, {"top_k": -1}, {"top_p": 1.0}, {"top_p": 2.0}, {"temperature": 0.5}]
)
def test_truncate_returns_none_where_nothing_is_cut(settings):
    assert truncate(LOGITS[None], **settings) is None


def test_a_top_p_of_one_keeps_tokens_of_probability_zero():
    assert truncate(torch.tensor([[0.0, 200.0, -200.0]]), top_k=2, top_p=1.0).tolist() == [[1, 0]]  # e^-200 is 0


def test_each_row_is_cut_by_itself_and_padded_with_minus_one():
    sure = torch.tensor([0.0, 0.0, 9.0, 0.0])
    assert truncate(torch.stack([LOGITS, sure])[None], top_p=0.75).tolist() == [[[1, 3, 0], [2, -1, -1]]]


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.4}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
def test_ties_are_broken_and_never_keep_more_than_asked(settings):
    kept = truncate(torch.zeros(1, 4), **settings)
    assert kept.shape == (1, 2)  # of equal tokens, 2 * 1/4 reach 0.4 and 0.5; 2 * 1/3 reach 0.5
    assert len(set(kept[0].tolist())) == 2
    assert kept.min() >= 0


@given(
    logits=st.lists(st.integers(-80, 80), min_size=7, max_size=7, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.7]),
    top_k=st.integers(0, 7),
    top_p=st.sampled_from([0.0, 0.37, 0.9, 0.999]),  # sums of exponentials never meet these: no tie to break
)
@settings(deadline=None, max_examples=50)
def test_the_sampler_and_the_scorer_use_one_distribution(logits, temperature, top_k, top_p):
    logits = torch.tensor(logits) / 10
    kept = truncate(logits[None], temperature=temperature, top_k=top_k, top_p=top_p)
    ids = kept[kept >= 0]
    expected = kept_by_loop(logits.tolist(), temperature, top_k, top_p)
    assert ids.tolist() == list(expected)
    rows = (logits.expand(1, len(ids), -1), ids[None])
    scores = token_logprobs(*rows, temperature=temperature, kept=kept.expand(1, len(ids), -1))
    assert_close(scores[0], torch.tensor(list(expected.values())), atol=2e-5, rtol=1e-5)
    assert_close(scores.exp().sum(), torch.tensor(1.0))  # the probabilities of the kept ids sum to 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probabilities_and_entropies_equal_a_plain_loop(temperature):
    logits = 3 * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([[0, 6, 3], [5, 5, 1]])
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    entropies = token_entropies(logits, temperature=temperature)
    for b in range(2):
        for t in range(3):
            logp = kept_by_loop(logits[b, t].tolist(), temperature, 0, 2.0)
            assert logprobs[b, t].item() == pytest.approx(logp[tokens[b, t].item()], abs=1e-12)
            assert entropies[b, t].item() == pytest.approx(-sum(math.exp(v) * v for v in logp.values()), abs=1e-12)


def test_entropy_is_the_expected_surprise_over_all_tokens_not_the_surprise_of_one():
    each = token_logprobs(LOGITS.expand(1, 4, 4), torch.arange(4)[None])[0]
    assert_close(token_entropies(LOGITS[None, None]).squeeze(), -(each.exp() * each).sum())


@pytest.mark.parametrize(
    ("logits", "nats"),
    [([5.0] * 7, math.log(7)), ([0.0, 0.0, -torch.inf], math.log(2)), ([1e4, 0.0], 0.0)],
)
def test_entropy_runs_from_certain_to_uniform(logits, nats):
    assert token_entropies(torch.tensor([[logits]])).item() == pytest.approx(nats, abs=1e-6)


def test_the_gradient_is_chosen_minus_probability_and_stays_inside_the_kept_set():
    logits = LOGITS[None, None].clone().requires_grad_()
    token_logprobs(logits, torch.tensor([[3]]), temperature=0.5, kept=torch.tensor([[[1, 3, -1]]])).backward()
    # squares 0.16 and 0.09 renormalised: 0.64 and 0.36; chosen 3; divided by the temperature 0.5
    assert_close(logits.grad, torch.tensor([[[0.0, -0.64 / 0.5, 0.0, (1 - 0.36) / 0.5]]]))


def test_adding_a_constant_to_all_logits_changes_nothing_and_nothing_overflows():
    tokens, kept = torch.tensor([[2]]), torch.tensor([[[2, 1]]])
    for case in ({}, {"kept": kept}, {"temperature": 0.1}):
        moved = token_logprobs(LOGITS[None, None] + 1024, tokens, **case)
        assert_close(moved, token_logprobs(LOGITS[None, None], tokens, **case), atol=2e-3, rtol=0)  # float32 at 1e4


def test_half_precision_logits_are_scored_in_float32():
    logits, tokens = torch.randn(1, 2, 7).bfloat16(), torch.tensor([[1, 4]])
    for case in ({}, {"temperature": 0.7}, {"kept": torch.tensor([[[1, 0], [4, -1]]])}):
        assert torch.equal(token_logprobs(logits, tokens, **case), token_logprobs(logits.float(), tokens, **case))
    assert torch.equal(token_entropies(logits), token_entropies(logits.float()))


@pytest.mark.parametrize("positions", [5, 2])
def test_logits_of_the_whole_sequence_are_refused_with_the_cure(positions):
    cure = r"Logits of the whole sequence\? Drop the last position and the prompt: logits\[:, -T-1:-1\]\.$"
    with pytest.raises(ValueError, match=rf"got \[1, {positions}, 7\] and \[1, 3\]\. {cure}"):
        token_logprobs(torch.zeros(1, positions, 7), torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize(("function", "tensors"), [(truncate, 1), (token_logprobs, 2), (token_entropies, 1)])
def test_settings_are_given_by_name(function, tensors):
    with pytest.raises(TypeError, match=f"takes {tensors} positional argument"):
        function(*[LOGITS] * (tensors + 1))
