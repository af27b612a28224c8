"""The generated text: batches equal a plain loop's lines, and no held-out problem occurs in them."""

from itertools import islice, permutations

import pytest
import torch

from grpo_lab.rewards.verifiable import solves
from grpo_lab.tasks.character_model import make_tokenizer
from grpo_lab.tasks.countdown import countdown_dataset, countdown_expressions, countdown_problems, countdown_prompt
from grpo_lab.tasks.countdown_text import (
    MAX_GAP,
    OPERATOR_SHARE,
    SUM_SHARE,
    UNSOLVABLE_SHARE,
    batches,
    make_corpus,
    mistakes_in,
    unsolvable_problems,
    write_lines,
)

TOKENIZER = make_tokenizer()
NUMBERS = pytest.mark.parametrize("numbers", [3, 4])


def drawn(lines, seed=0):
    # float64, so that the plain loop makes the same choices
    return torch.rand(lines, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written(numbers, careful_share, lines=2000, seed=0):
    """Return [(prompt, answer), ...] of the lines written, after a check of the labels."""
    ids, labels = write_lines(make_corpus(numbers), drawn(lines, seed), careful_share)
    assert ids.shape == labels.shape == (lines, 4 * numbers + 3)
    result = []
    for row, label in zip(ids, labels, strict=True):
        prompt, answer = TOKENIZER.decode(row).split("=")
        answer, padding = answer.split("<eos>")
        assert set(padding.split("<pad>")) == {""}
        begins = len(prompt) + 1
        assert label.tolist() == [-100] * begins + row[begins : begins + len(answer) + 1].tolist() + [-100] * (
            len(row) - begins - len(answer) - 1
        )
        result.append((prompt + "=", answer))
    return result


def problem(prompt):
    numbers, target = prompt.rstrip("=").split(":")
    return tuple(sorted(map(int, numbers.split(",")))), int(target)


def plain_line(numbers, u, careful_share):
    """Write the same line in plain Python, one choice after the other."""

    def choose(place, among):
        return among[int(u[place] * len(among))]

    if u[0] < UNSOLVABLE_SHARE:
        chosen, target, answers = choose(1, unsolvable_problems(numbers))
    else:
        chosen, target = choose(1, countdown_problems("train", numbers))
        answers = countdown_expressions(chosen)[target]
    order = choose(2, list(permutations(chosen)))
    prompt, answer = countdown_prompt(order, target), choose(3, answers)
    if u[4] < careful_share:
        return prompt, answer
    added_up = "+".join(map(str, order))
    if u[5] < SUM_SHARE and not solves(prompt, added_up):
        return prompt, added_up
    operators, twice = mistakes_in(answer, target)
    return prompt, choose(6, twice if u[5] >= SUM_SHARE + OPERATOR_SHARE else operators)


@NUMBERS
@pytest.mark.parametrize("careful_share", [0.0, 0.4, 1.0])
def test_a_batch_equals_the_lines_of_a_plain_loop(numbers, careful_share):
    expected = [plain_line(numbers, u, careful_share) for u in drawn(2000).tolist()]
    assert written(numbers, careful_share) == expected


@NUMBERS
def test_the_careful_author_is_always_right_on_solvable_problems_and_the_careless_never(numbers):
    near = {(chosen, target) for chosen, target, _ in unsolvable_problems(numbers)}
    solvable = 0
    for share in (1.0, 0.0):
        for prompt, answer in written(numbers, share):
            if problem(prompt) in near:
                assert not solves(prompt, answer)
            else:
                solvable += 1
                assert solves(prompt, answer) == (share == 1.0)
    assert solvable > 1000


def test_no_mistake_solves_its_problem():
    corpus = make_corpus(3)  # every mistake of the smaller corpus
    answers = [(c, t, a) for c, t in countdown_problems("train") for a in countdown_expressions(c)[t]]
    for expression, (chosen, target, answer) in enumerate(answers):
        assert TOKENIZER.decode(corpus.answers[expression]) == answer
        for kind in (0, 1):
            mistakes = TOKENIZER.batch_decode(
                corpus.mistakes[expression, kind, : corpus.num_mistakes[expression, kind]]
            )
            assert mistakes
            assert not any(solves(countdown_prompt(chosen, target), text) for text in mistakes)


def test_if_one_kind_of_mistake_is_impossible_the_other_takes_its_place():
    operators, twice = mistakes_in("2*2+2+2", 8)  # 2+2+2+2 is 8 too, and there is no other number to use twice
    assert operators == twice == ["2-2+2+2", "2*2-2+2", "2*2*2+2", "2*2+2-2"]


@NUMBERS
def test_a_problem_without_a_solution_is_answered_by_the_nearest_expression(numbers):
    for chosen, target, answers in unsolvable_problems(numbers):
        assert target not in countdown_expressions(chosen)
        gap = min(abs(value - target) for value in countdown_expressions(chosen))
        values = {value for value, texts in countdown_expressions(chosen).items() if set(texts) & set(answers)}
        assert {abs(value - target) for value in values} == {gap}
        assert 0 < gap <= MAX_GAP
    assert len(unsolvable_problems(numbers)) > 1000


@NUMBERS
def test_no_held_out_problem_occurs_in_the_text_or_the_training_set_under_any_seed(numbers):
    held_out = set(countdown_problems("held-out", numbers))
    corpus = make_corpus(numbers)  # all that can be written
    digits = TOKENIZER.batch_decode(torch.cat([corpus.numbers, corpus.target], 1))
    written_problems = {(tuple(map(int, line[:numbers])), int(line[numbers:])) for line in digits}
    assert not written_problems & held_out
    assert len(written_problems) == len(corpus.numbers) == corpus.num_solvable + len(unsolvable_problems(numbers))
    for seed in range(3):
        lines = written(numbers, 0.5, seed=seed)
        assert {problem(prompt) for prompt, _ in lines} <= written_problems
        prompts = countdown_dataset(1000, numbers=numbers, seed=seed).columns["prompt"]
        assert not {problem(prompt) for prompt in prompts} & held_out


def test_the_seed_decides_the_batches_and_they_do_not_repeat():
    def some(seed):
        return list(islice(batches(make_corpus(4), 8, 0.5, torch.Generator().manual_seed(seed), ahead=3), 7))

    first, again, other = some(1), some(1), some(2)
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert len({str(ids) for ids, _ in first}) == 7  # new lines after the third batch
    assert all(ids.shape == (8, 19) for ids, _ in first)
