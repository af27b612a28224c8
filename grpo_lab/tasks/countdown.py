"""Countdown: reach a target from three or four numbers, "3,5,7:22=" -> "5*3+7"."""

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations_with_replacement, permutations
from random import Random

from grpo_lab.rollout.prompts import SimplePromptDataset

HELD_OUT_PERCENT = 17

# Operators of each form -> whether an order of the numbers is the one that is written. Where operands commute, only the
# order with the larger number first is written.
FORMS: dict[int, dict[str, Callable[..., bool]]] = {
    3: {
        "*+": lambda a, b, c: a >= b,
        "+-": lambda a, b, c: a >= b,
        "++": lambda a, b, c: a >= b >= c,
        "**": lambda a, b, c: a >= b >= c,
    },
    4: {
        "+++": lambda a, b, c, d: a >= b >= c >= d,
        "++-": lambda a, b, c, d: a >= b >= c,
        "*++": lambda a, b, c, d: a >= b and c >= d,
        "*+-": lambda a, b, c, d: a >= b,
        "*+*": lambda a, b, c, d: a >= b and c >= d and (a, b) >= (c, d),
        "*-*": lambda a, b, c, d: a >= b and c >= d,
    },
}


def countdown_dataset(size: int, *, numbers: int = 3, split: str = "train", seed: int = 0) -> SimplePromptDataset:
    """Return different solvable Countdown prompts; their reward is `grpo_lab.rewards.verifiable.countdown`.

    A problem is a target and numbers in any order. Its split depends on the problem alone, so no held-out problem
    occurs in training under any seed.

    Args:
        numbers: how many numbers a problem has, 3 or 4.
    Raises: ValueError if the split has fewer than `size` prompts.

    >>> countdown_dataset(2, seed=1)[0]
    {'prompt': '4,8,4:36='}
    >>> countdown_dataset(2, numbers=4)[0]
    {'prompt': '3,7,3,4:20='}
    """
    prompts = [
        countdown_prompt(order, target)
        for chosen, target in countdown_problems(split, numbers)
        for order in sorted(set(permutations(chosen)))
    ]
    if size > len(prompts):
        raise ValueError(
            f"there are only {len(prompts)} Countdown prompts in the split {split!r}, {size} were asked for."
        )
    return SimplePromptDataset(Random(f"{seed}/{split}").sample(prompts, size))


def countdown_prompt(numbers: Sequence[int], target: int) -> str:
    """Return the prompt of a problem.

    >>> countdown_prompt([3, 5, 7], 22)
    '3,5,7:22='
    """
    return f"{','.join(map(str, numbers))}:{target}="


@cache
def countdown_problems(split: str, numbers: int = 3) -> list[tuple[tuple[int, ...], int]]:
    """Return all problems of "train" or "held-out": numbers in ascending order, and a target that can be reached."""
    if split not in ("train", "held-out"):
        raise ValueError(f'split must be "train" or "held-out", got {split!r}.')

    def held_out(numbers: tuple[int, ...], target: int) -> bool:
        return zlib.crc32(countdown_prompt(numbers, target).encode()) % 100 < HELD_OUT_PERCENT

    return [
        (chosen, target)
        for chosen in countdown_numbers(numbers)
        for target in sorted(countdown_expressions(chosen))
        if 0 <= target <= 99 and held_out(chosen, target) == (split == "held-out")
    ]


def countdown_numbers(numbers: int) -> list[tuple[int, ...]]:
    """Return all choices of 3 or 4 numbers from 2 to 9, each in ascending order. Raises ValueError otherwise."""
    if numbers not in FORMS:
        raise ValueError(f"Countdown has {' or '.join(map(str, FORMS))} numbers here, got {numbers}.")
    return list(combinations_with_replacement(range(2, 10), numbers))


@cache
def countdown_expressions(numbers: tuple[int, ...]) -> dict[int, list[str]]:
    """Return value -> expressions that use each number once, in a few forms.

    With three numbers a+b+c, a+b-c, a*b+c, a*b*c; with four a+b+c+d, a+b+c-d, a*b+c+d, a*b+c-d, a*b+c*d, a*b-c*d.
    With few forms, and without the number 1, by which multiplying changes nothing, a small model can learn the task.

    >>> countdown_expressions((3, 5, 7))
    {22: ['5*3+7'], 1: ['5+3-7'], 26: ['7*3+5'], 5: ['7+3-5'],
     38: ['7*5+3'], 9: ['7+5-3'], 15: ['7+5+3'], 105: ['7*5*3']}
    """
    found: dict[int, list[str]] = {}
    for order in sorted(set(permutations(numbers))):
        for operators, is_written in FORMS[len(numbers)].items():
            if is_written(*order):
                text = str(order[0]) + "".join(f"{o}{n}" for o, n in zip(operators, order[1:], strict=True))
                found.setdefault(countdown_value(order, operators), []).append(text)
    return found


def countdown_value(numbers: Sequence[int], operators: str) -> int:
    """Return the value of the numbers with the operators + - * between them.

    >>> countdown_value([5, 3, 7], "*+")
    22
    """
    total, term = 0, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            term *= number
        else:
            total, term = total + term, number if operator == "+" else -number
    return total + term


def pocket_countdown(seed: int = 0):
    """Return Countdown for the pocket model: 2048 training prompts and 400 held-out ones."""
    from grpo_lab import pocket

    return countdown_dataset(pocket.NUM_PROMPTS, seed=seed), countdown_dataset(400, split="held-out", seed=seed)


def countdown_with_four(seed: int = 0):
    """Return Countdown with four numbers: 8192 training prompts and 400 held-out ones."""
    return countdown_dataset(8192, numbers=4, seed=seed), countdown_dataset(400, numbers=4, split="held-out", seed=seed)
