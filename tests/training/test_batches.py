"""Micro-batches: how a rollout is cut changes what a pass costs, and no number."""

import pytest
import torch
from torch.testing import assert_close
from trainers import PROMPTS, make_trainer

from grpo_lab.rollout.sampling import Rollouts
from grpo_lab.training import step
from grpo_lab.training.batches import make_micro_batches

K = 2


def rollouts(prompts: list[int], completions: list[int], *, kept: int | None = None) -> Rollouts:
    """Groups with prompts of so many tokens and completions of so many; token n of row i is 100 i + n."""
    width, tokens, rows = max(prompts), max(completions), len(completions)
    column = torch.arange(width + tokens)
    left, right = torch.tensor(prompts).repeat_interleave(K), torch.tensor(completions)
    mask = (column >= width - left[:, None]) & (column < width + right[:, None])
    ids = 100 * torch.arange(rows)[:, None] + (column - width + left[:, None])
    drawn = mask[:, width:]
    return Rollouts(
        input_ids=ids * mask,
        attention_mask=mask.long(),
        completion_mask=drawn,
        logprobs=-(ids[:, width:] / 100) * drawn,
        kept=None if kept is None else torch.where(drawn, ids[:, width:], -1)[..., None].expand(-1, -1, kept),
        ended=torch.arange(rows) % 2 == 0,
    )


def rows_of(some: Rollouts) -> list[tuple]:
    """What a row says, whatever the padding."""
    return [
        (some.input_ids[i][some.attention_mask[i] == 1].tolist(), some.logprobs[i][m].tolist(), bool(some.ended[i]),
         some.kept is not None and [sorted({*k.tolist()} - {-1}) for k in some.kept[i][m]])
        for i, m in enumerate(some.completion_mask)
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [None, 1])
def test_selected_rows_lose_padding_and_nothing_else(kept):
    whole = rollouts([2, 5, 3], [1, 2, 6, 3, 2, 2], kept=kept)
    rows = torch.tensor([4, 5, 0, 1])
    some = whole.select(rows)
    assert (some.input_ids.shape, some.num_tokens) == ((4, 3 + 2), 2)
    assert rows_of(some) == [rows_of(whole)[i] for i in rows]
    assert some.input_ids[2].tolist() == [0, 0, 1, 2, 0]  # prompt on the right of its columns, completion on the left


@pytest.mark.parametrize("kept", [None, (1, 3)])
def test_joined_rollouts_have_the_rows_of_all(kept):
    one, other = (
        rollouts(*lengths, kept=kept and kept[i]) for i, lengths in enumerate([([2], [1, 4]), ([3, 1], [2, 2, 1, 2])])
    )
    assert rows_of(Rollouts.join([one, other], pad_id=9)) == rows_of(one) + rows_of(other)
    assert Rollouts.join([one, other], pad_id=9).input_ids[0].tolist() == [9, 0, 1, 2, 0, 0, 0]
    assert Rollouts.join([one], pad_id=9) is one


def test_groups_stay_whole_in_micro_batches_of_like_length_within_the_budget():
    prompts = [3, 3, 9, 3, 3, 3]
    completions = [2, 2, 7, 6, 1, 2, 2, 1, 7, 1, 1, 1]
    whole = rollouts(prompts, completions)
    parts = make_micro_batches(whole, K, 24, torch.zeros(6, dtype=torch.bool))
    assert [part.rows.tolist() for part in parts] == [[10, 11, 0, 1], [6, 7], [4, 5], [2, 3], [8, 9]]
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(12))
    for part in parts:
        assert part.rows.view(-1, K)[:, 0].remainder(K).eq(0).all()
        assert part.rows.view(-1, K)[:, 1].equal(part.rows.view(-1, K)[:, 0] + 1)
        assert part.rollouts.input_ids.numel() <= 24
        assert rows_of(part.rollouts) == [rows_of(whole)[i] for i in part.rows]
    assert (
        make_micro_batches(whole, K, 12 * 16, torch.zeros(6, dtype=torch.bool))[0].rollouts is whole
    )  # all fits as it is


def test_a_group_larger_than_the_budget_stands_alone():
    parts = make_micro_batches(rollouts([3, 3], [2, 2, 2, 2]), K, 1, torch.zeros(2, dtype=torch.bool))
    assert [part.rows.tolist() for part in parts] == [[0, 1], [2, 3]]


def test_idle_groups_stand_apart_but_one_micro_batch_always_has_a_gradient():
    whole = rollouts([3, 3, 3], [2, 2, 5, 4, 1, 1])
    parts = make_micro_batches(whole, K, 1000, torch.tensor([False, True, False]))
    assert [(part.rows.tolist(), part.no_gradient) for part in parts] == [([4, 5, 0, 1], False), ([2, 3], True)]
    assert [part.no_gradient for part in make_micro_batches(whole, K, 12, torch.ones(3, dtype=torch.bool))] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("everything", [False, True], ids=["some groups", "all groups"])
def test_a_group_without_advantages_costs_no_backward_and_changes_no_number(tmp_path, monkeypatch, everything):
    def reward(prompts, completions, **_):
        return [0.0 if everything else float("3" in c and p < "2") for p, c in zip(prompts, completions, strict=True)]

    def run(path):
        found = make_trainer(path, reward=reward, kl_coef=0.0, learning_rate=1e-4, num_iterations=2, max_steps=6)
        passes = []
        found.components.engine._backward = lambda loss: passes.append(loss) or loss.backward()
        metrics = [{**record.metrics, "step_time": 0.0} for record in found.steps()]
        return metrics, torch.cat([p.detach().flatten() for p in found.model.parameters()]), len(passes), found

    ours, our_weights, our_passes, found = run(tmp_path / "ours")
    whole = step.make_micro_batches
    monkeypatch.setattr(
        step,
        "make_micro_batches",
        lambda r, k, budget, no_gradient: whole(r, k, budget, torch.zeros_like(no_gradient)),
    )
    theirs, their_weights, their_passes, _ = run(tmp_path / "theirs")
    assert 0 < ours[0]["frac_reward_zero_std"] <= 1
    assert_close(our_weights, their_weights, atol=2e-6, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert our_passes == their_passes == 6  # one micro-batch of living groups each, as if there were no others
    assert all(
        len(found.components.engine.optimizer.state[p]) > 0 for p in found.model.parameters()
    )  # Adam has seen gradients


def test_a_micro_batch_may_be_as_large_as_batch_size_prompts_with_the_longest_completions(tmp_path, monkeypatch):
    budgets, whole = [], step.make_micro_batches
    monkeypatch.setattr(
        step,
        "make_micro_batches",
        lambda r, k, budget, no_gradient: budgets.append(budget) or whole(r, k, budget, no_gradient),
    )
    run = make_trainer(tmp_path, batch_size=2, gradient_accumulation_steps=6)
    batch = run.collect(range(12))  # sampled eight and four prompts at a time
    longest = max(len(prompt) for prompt in PROMPTS)
    assert budgets == [2 * 4 * (longest + 6)]
    assert sum(len(part.rows) for part in batch.parts) == 48
