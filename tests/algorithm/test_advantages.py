"""Advantages by hand, against a plain loop, and under changes that must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_lab.algorithm.advantages import all_equal, discounted, group_advantages, group_std

NAN = math.nan
WRONG = ["Mean", "median", "std"]
OPTIONS = [(b, s) for b in ("mean", "leave-one-out", "none") for s in ("group", "batch", "none")]


def by_loop(rewards, baseline, scale, std_eps=1e-4):
    """The definition in Python floats; NaN means not scored."""

    def std(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    everyone = [r for group in rewards for r in group if not math.isnan(r)]
    result = []
    for group in rewards:
        scored = [r for r in group if not math.isnan(r)]
        row = []
        for k, r in enumerate(group):
            others = [v for j, v in enumerate(group) if j != k and not math.isnan(v)]
            subtract = {"mean": scored, "leave-one-out": others, "none": [0.0]}[baseline]
            divide = {"group": std(scored) + std_eps, "batch": std(everyone) + std_eps, "none": 1.0}[scale]
            dead = math.isnan(r) or (baseline != "none" and len(set(scored)) < 2)
            row.append(0.0 if dead else (r - sum(subtract) / len(subtract)) / divide)
        result.append(row)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": "none"}, [0.75, -0.25, -0.25, -0.25]),  # mean 1/4
        ({"scale": "none", "baseline": "none"}, [1.0, 0.0, 0.0, 0.0]),
        ({"scale": "none", "baseline": "leave-one-out"}, [1.0, -1 / 3, -1 / 3, -1 / 3]),  # others: 0; (1 + 0 + 0) / 3
        # sum of squares 0.5625 + 3 * 0.0625 = 0.75; divided by n - 1 = 3: 0.25; root 0.5; by n it would be 0.433
        ({"std_eps": 0.0}, [1.5, -0.5, -0.5, -0.5]),
        ({"std_eps": 0.5}, [0.75, -0.25, -0.25, -0.25]),  # 0.75 / (0.5 + 0.5): added outside the root
        ({}, [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]),  # std_eps is 1e-4
    ],
)
def test_one_right_answer_of_four(options, expected):
    assert_close(group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), **options), torch.tensor([expected]))


def test_batch_scale_divides_by_the_std_of_all_rewards_not_of_the_group():
    rewards = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    # all four: mean 3, squares 9 + 1 + 1 + 9 = 20, 20 / 3, root 2.582; each group is 1 from its own mean
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) / (math.sqrt(20 / 3) + 1e-4)
    assert_close(group_advantages(rewards, scale="batch"), expected)


@pytest.mark.parametrize(("baseline", "scale"), OPTIONS)
def test_every_option_equals_the_plain_loop(baseline, scale):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[1, 2] = rewards[2, 0] = rewards[2, 3] = NAN  # not scored
    rewards[3] = 0.3  # all equal
    rewards[4] = torch.tensor([NAN, NAN, 2.0, NAN])  # a single score
    result = group_advantages(rewards, baseline=baseline, scale=scale)
    assert_close(result, by_loop(rewards.tolist(), baseline, scale), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1 / 3, -1e-3, 123.456])
def test_equal_rewards_give_exactly_zero(value, scale, baseline):
    for K in (2, 3, 7, 12):
        rewards = torch.tensor([[value] * K, [0.0] * (K - 1) + [1.0]])
        advantages = group_advantages(rewards, scale=scale, baseline=baseline, std_eps=1e-12)
        assert advantages[0].tolist() == [0.0] * K
        assert advantages[1].abs().min() > 0


def test_a_reward_of_nan_is_left_out_of_mean_std_and_count():
    with_gap = group_advantages(torch.tensor([[1.0, NAN, 0.0, 2.0]]))
    without = group_advantages(torch.tensor([[1.0, 0.0, 2.0]]))
    assert_close(with_gap, torch.tensor([[without[0, 0], 0.0, without[0, 1], without[0, 2]]]))


@pytest.mark.parametrize(("baseline", "scale"), OPTIONS)
def test_a_group_without_scores_gets_zero_and_changes_no_other(baseline, scale):
    scored = torch.tensor([[1.0, 0.0, 3.0]])
    alone = group_advantages(scored, baseline=baseline, scale=scale)
    both = group_advantages(torch.cat([torch.full((1, 3), NAN), scored]), baseline=baseline, scale=scale)
    assert_close(both, torch.cat([torch.zeros(1, 3), alone]))


@given(
    rewards=st.lists(
        st.lists(st.integers(-5, 5).map(float) | st.just(NAN), min_size=3, max_size=3), min_size=2, max_size=4
    ),
    option=st.sampled_from(OPTIONS),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_permuting_prompts_and_completions_permutes_the_advantages(rewards, option, seed):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    prompts, completions = (torch.randperm(n, generator=generator) for n in rewards.shape)
    baseline, scale = option
    advantages = group_advantages(rewards, baseline=baseline, scale=scale)
    moved = group_advantages(rewards[prompts][:, completions], baseline=baseline, scale=scale)
    assert_close(moved, advantages[prompts][:, completions])
    assert advantages.isfinite().all()
    if baseline != "none":
        assert_close(advantages.sum(1), torch.zeros(len(rewards), dtype=torch.float64))
        assert_close(group_advantages(rewards + 7, baseline=baseline, scale=scale), advantages)


def test_a_batch_is_scaled_from_its_second_score_on():
    for baseline, scale in OPTIONS:  # warnings are errors: a std of nothing or of one would warn, and be NaN
        nobody = group_advantages(torch.full((2, 2), NAN), baseline=baseline, scale=scale)
        assert nobody.tolist() == [[0.0, 0.0]] * 2
    alone = group_advantages(torch.tensor([[NAN, 2.0]]), baseline="none", scale="batch")
    assert alone.tolist() == [[0.0, 2.0]]
    two = group_advantages(torch.tensor([[0.0, 2.0]]), scale="batch", std_eps=0.0)  # (1 + 1) / 1, root 1.414
    assert_close(two, torch.tensor([[-1.0, 1.0]]) / math.sqrt(2))


def test_leave_one_out_is_the_mean_baseline_times_k_over_k_minus_one():
    rewards = torch.rand(3, 5)
    rloo = group_advantages(rewards, baseline="leave-one-out", scale="none")
    assert_close(rloo, group_advantages(rewards, scale="none") * 5 / 4)


@pytest.mark.parametrize(("function", "tensors"), [(group_advantages, 1), (discounted, 2)])
def test_settings_are_given_by_name(function, tensors):
    with pytest.raises(TypeError, match=f"takes {tensors} positional argument"):
        function(*[torch.ones(1, 2)] * (tensors + 1))


def test_no_gradient_flows_back_into_the_rewards_and_integers_are_accepted():
    assert not group_advantages(torch.rand(2, 3, requires_grad=True)).requires_grad
    assert group_advantages(torch.tensor([[1, 0]]), scale="none").tolist() == [[0.5, -0.5]]


def test_half_precision_rewards_are_compared_in_float32():
    rewards = torch.rand(2, 3).bfloat16()
    assert torch.equal(group_advantages(rewards), group_advantages(rewards.float()))


def test_all_equal_and_group_std_ignore_missing_scores():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [-0.1, NAN, -0.1], [NAN, NAN, 5.0], [NAN] * 3, [0.0, 2.0, NAN]])
    assert all_equal(rewards).tolist() == [True, True, True, True, False]
    assert group_std(rewards)[2:].tolist() == pytest.approx([0.0, 0.0, math.sqrt(2)])  # (1 + 1) / (2 - 1)


def test_discounted_gives_the_last_token_all_and_earlier_ones_less():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    expected = [[2, 4, 8, 0], [-1, -2, -4, -8], [0, 0, 0, 0]]  # 8 halves at each step back
    assert discounted(torch.tensor([8.0, -8.0, 8.0]), mask, gamma=0.5).tolist() == expected
    everywhere = discounted(torch.tensor([3.0] * 3), mask, gamma=1.0)
    assert torch.equal(everywhere, 3.0 * mask)


def test_discounted_stays_on_the_device_of_its_arguments():
    advantages, mask = torch.ones(2, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert discounted(advantages, mask, gamma=0.5).device.type == "meta"  # a device that every machine has


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.zeros(8), {}, r"got \[8\]\. One flat list of P\*K rewards\? Use rewards\.view\(P, K\)\.$"),
        (torch.zeros(2, 2, 2), {}, r"must be \[prompts, K\], got \[2, 2, 2\]"),
        (torch.zeros(8, 1), {}, r"K >= 2, got K = 1\. One completion has nothing to be compared with:.*always be 0\.$"),
        # names that a dictionary would put before and after the right ones
        *[(torch.zeros(2, 2), {"baseline": b}, rf'"mean", "leave-one-out" or "none", got \'{b}\'') for b in WRONG],
        *[(torch.zeros(2, 2), {"scale": s}, rf'"group", "batch" or "none", got \'{s}\'') for s in WRONG],
    ],
)
def test_an_error_says_what_came_and_the_cure(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **options)
