"""Countdown: every prompt is solvable, and no held-out problem occurs in training."""

import re
from itertools import combinations_with_replacement, permutations, product

import pytest

from grpo_lab.rewards.verifiable import evaluate_expression, solves
from grpo_lab.tasks.countdown import countdown_dataset, countdown_expressions, countdown_problems

NUMBERS = pytest.mark.parametrize("numbers", [3, 4])
FORMS = {
    3: ("{}+{}+{}", "{}+{}-{}", "{}*{}+{}", "{}*{}*{}"),
    4: ("{}+{}+{}+{}", "{}+{}+{}-{}", "{}*{}+{}+{}", "{}*{}+{}-{}", "{}*{}+{}*{}", "{}*{}-{}*{}"),
}


def all_numbers(numbers):
    return list(combinations_with_replacement(range(2, 10), numbers))


def problem(prompt):
    numbers, target = prompt.rstrip("=").split(":")
    return tuple(sorted(map(int, numbers.split(",")))), int(target)


@pytest.mark.parametrize("numbers", all_numbers(3)[::5] + all_numbers(4)[::15], ids=str)
def test_every_expression_has_its_value_and_uses_each_number_once(numbers):
    found = countdown_expressions(numbers)
    for value, expressions in found.items():
        assert all(evaluate_expression(text) == (value, list(numbers)) for text in expressions)
    texts = [text for expressions in found.values() for text in expressions]
    for text in texts:  # where operands commute, the larger number comes first
        signs, terms = ["+", *re.findall("[+-]", text)], [term.split("*") for term in re.split("[+-]", text)]
        assert all(term == sorted(term, reverse=True) for term in terms)
        added = [(len(term), term) for sign, term in zip(signs, terms, strict=True) if sign == "+"]
        assert added == sorted(added, reverse=True)
    assert len(set(texts)) == len(texts)
    orders = set(permutations(numbers))
    values = {evaluate_expression(form.format(*order))[0] for form in FORMS[len(numbers)] for order in orders}
    assert found.keys() == values  # no value is missing
    shapes = {re.sub(r"\d", "{}", text) for text in texts}
    assert shapes == set(FORMS[len(numbers)])


@NUMBERS
def test_every_prompt_can_be_solved(numbers):
    for split in ("train", "held-out"):
        for prompt in countdown_dataset(200, numbers=numbers, split=split).columns["prompt"]:
            chosen, target = problem(prompt)
            assert len(chosen) == numbers
            assert 0 <= target <= 99
            assert solves(prompt, countdown_expressions(chosen)[target][0])


@NUMBERS
def test_held_out_problems_never_occur_in_training(numbers):
    problems = {split: set(countdown_problems(split, numbers)) for split in ("train", "held-out")}
    everything = {(n, t) for n in all_numbers(numbers) for t in countdown_expressions(n) if 0 <= t <= 99}
    assert problems["train"] | problems["held-out"] == everything
    assert not problems["train"] & problems["held-out"]
    assert 0.12 < len(problems["held-out"]) / len(everything) < 0.22
    for split, seed in product(problems, range(3)):
        prompts = countdown_dataset(300, numbers=numbers, split=split, seed=seed).columns["prompt"]
        assert {problem(p) for p in prompts} <= problems[split]


def test_countdown_prompts_are_all_different_and_drawn_by_the_seed():
    prompts = countdown_dataset(500, seed=7).columns["prompt"]
    assert len(set(prompts)) == 500
    assert prompts == countdown_dataset(500, seed=7).columns["prompt"]
    assert prompts != countdown_dataset(500, seed=8).columns["prompt"]
    rising = [numbers == sorted(numbers) for numbers in (p.split(":")[0].split(",") for p in prompts)]
    assert sum(rising) < 200  # one order in six is ascending if the three numbers differ


def test_unknown_splits_and_sizes_are_refused():
    with pytest.raises(ValueError, match='"train" or "held-out", got \'test\''):
        countdown_dataset(1, split="test")
    with pytest.raises(ValueError, match=r"only \d+ Countdown prompts in the split 'held-out', 100000 were asked for"):
        countdown_dataset(100_000, split="held-out")
    with pytest.raises(ValueError, match="Countdown has 3 or 4 numbers here, got 5"):
        countdown_dataset(1, numbers=5)
