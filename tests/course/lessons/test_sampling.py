"""Notebook 02: what its pictures show is what the package's sampler and scorer do."""

import pytest
import torch
from conftest import tiny_architecture
from matplotlib.figure import Figure

from grpo_lab.course.lessons import sampling as lesson

PROMPTS = ["3,5,7:22=", "1,2:3="]


@pytest.fixture
def rollouts(model, tokenizer):
    return lesson.roll(model, tokenizer, PROMPTS, 3, temperature=1.5)


def names_of(tokenizer):
    return [tokenizer.decode([i]) for i in range(len(tokenizer))]


def test_the_samplers_probabilities_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert lesson.sampler(logits).tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert lesson.sampler(logits, top_k=2).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert lesson.sampler(logits, top_p=0.8).tolist() == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0])
    assert lesson.sampler(logits, temperature=0.5).tolist() == pytest.approx([0.7246, 0.1812, 0.0652, 0.0290], abs=1e-4)


def test_the_chance_of_an_answer_is_the_product_over_its_tokens(model, tokenizer):
    chance = 1.0
    for text, token in (("1=", "2"), ("1=2", "+"), ("1=2+", "<eos>")):
        p = lesson.next_logits(model, tokenizer, text).softmax(-1)
        chance *= p[tokenizer.convert_tokens_to_ids(token)].item()
    assert lesson.answer_probability(model, tokenizer, "1=", "2+") == pytest.approx(chance)


def test_scored_as_sampled_every_ratio_is_one(model, tokenizer):
    settings = {"temperature": 1.7, "top_k": 9, "top_p": 0.8}
    rollouts = lesson.roll(model, tokenizer, PROMPTS, 4, **settings)
    same = lesson.ratios(model, rollouts, temperature=1.7, kept=rollouts.kept)
    assert len(same) == rollouts.completion_mask.sum()
    assert torch.allclose(same, torch.ones_like(same), atol=1e-4)
    assert (lesson.ratios(model, rollouts) - 1).abs().max() > 0.1


@pytest.mark.parametrize(("name", "needs_positions"), [("gpt2", True), ("qwen2", False)])
def test_padding_cannot_be_seen_with_mask_and_positions(name, needs_positions):
    network, row = tiny_architecture(name), torch.arange(5, 15)
    assert lesson.padding_error(network, row, 4, 3) < 1e-4
    assert (lesson.padding_error(network, row, 4, 3, positions=False) > 0.01) == needs_positions
    assert lesson.padding_error(network, row, 4, 3, mask=False, positions=False) > 0.01


def test_the_mean_push_is_that_of_every_token_weighed_by_its_chance():
    scored = torch.tensor([0.5, 0.3, 0.2])
    sampled = torch.tensor([0.7, 0.3, 0.0])
    by_hand = sum(p * (torch.eye(3)[w] - scored) for w, p in enumerate(sampled))  # d log pi(w) = [v = w] - pi(v)
    assert torch.allclose(lesson.push(sampled, scored), by_hand)


def test_a_table_says_what_every_token_is(rollouts, tokenizer):
    values, kinds = lesson.cells(rollouts, names_of(tokenizer), "token")
    for r, prompt in enumerate([p for p in PROMPTS for _ in range(3)]):
        assert "".join(v for v, k in zip(values[r], kinds[r], strict=True) if k == "prompt") == prompt
        drawn = sum(k in ("completion", "end") for k in kinds[r])
        assert drawn == rollouts.completion_mask[r].sum()
        assert ("end" in kinds[r]) == rollouts.ended[r]
    masks, _ = lesson.cells(rollouts, names_of(tokenizer), "completion mask")
    T = rollouts.num_tokens
    assert [[int(v) for v in row[-T:]] for row in masks] == rollouts.completion_mask.long().tolist()
    positions, _ = lesson.cells(rollouts, names_of(tokenizer), "position")
    assert positions[3][:5] == ["0", "0", "0", "0", "1"]  # three columns of padding before the shorter prompt


def test_pictures_show_the_data(model, tokenizer, rollouts):
    names, logits = names_of(tokenizer), {"1+": lesson.next_logits(model, tokenizer, "1+")}
    lesson.ground_of_distribution(figure := Figure())
    words = lesson.draw_distribution(figure, "1+", 0.7, 3, 1.0, logits=logits, names=names)
    plain, cut = (bars.datavalues for bars in figure.axes[0].containers)
    assert list(plain) == pytest.approx(logits["1+"].softmax(-1).sort(descending=True).values[:9].tolist())
    assert (cut > 0).sum() == 3
    assert "3 of 21 tokens kept" in words

    rows, columns = rollouts.input_ids.shape
    lesson.ground_of_batch(figure := Figure(), rows, columns)
    words = lesson.draw_batch(figure, "token", 1.5, roll=lambda temperature: rollouts, names=names)
    assert f"{rows} rows of {columns} columns" in words
    assert len(figure.axes[0].texts) == rows * columns + 2

    for scorer, expected in (("as sampled", "0.0001: True"), ("plain softmax", "0.0001: False")):
        lesson.ground_of_ratios(figure := Figure())
        words = lesson.draw_ratios(figure, 1.5, 1.0, scorer, roll=lambda temperature, top_p: rollouts, model=model)
        assert figure.axes[0].patches[-1].get_data().values.sum() == pytest.approx(1)
        assert expected in words
