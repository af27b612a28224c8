"""Generated Countdown text for pre-training, written as whole batches of token ids.

Two authors write it. The careful author solves the problem. The careless author mostly adds all numbers up, or makes
one mistake. No held-out problem (`countdown_problems`) occurs. What lets a small model generalise to held-out problems
is text about problems without a solution, which are answered by the nearest expression.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lab.tasks.character_model import CHARACTERS, make_tokenizer
from grpo_lab.tasks.countdown import countdown_expressions, countdown_numbers, countdown_problems, countdown_value

UNSOLVABLE_SHARE = 0.65  # share of the lines whose problem has no solution
MAX_GAP = 6  # largest distance between the target of such a problem and its nearest expression
SUM_SHARE, OPERATOR_SHARE = 0.78, 0.13  # careless author: adds up; takes a wrong operator; else uses a number twice

Batches = Iterator[tuple[Tensor, Tensor]]


@cache
def unsolvable_problems(numbers: int = 3) -> list[tuple[tuple[int, ...], int, list[str]]]:
    """Return the problems without a solution, each as (numbers, target, expressions with the nearest value)."""
    problems = []
    for chosen in countdown_numbers(numbers):
        values = countdown_expressions(chosen)
        for target in set(range(100)) - values.keys():
            gap = min(abs(value - target) for value in values)
            if gap <= MAX_GAP:
                problems.append((chosen, target, values.get(target - gap, []) + values.get(target + gap, [])))
    return problems


class CountdownCorpus(NamedTuple):
    """All that the authors may write, as token ids: N problems, the solvable ones first, and their E answers."""

    num_solvable: int
    """How many of the N problems have a solution."""
    numbers: Tensor
    """[N, n] token ids of each problem's numbers, in ascending order."""
    target: Tensor
    """[N, 2] token ids of the target's tens and ones."""
    one_digit: Tensor
    """[N] bool, True where the target has one digit."""
    sum_solves: Tensor
    """[N] bool, True where the sum of the numbers solves the problem."""
    first_answer: Tensor
    """[N] index, among the E answers, of the problem's first answer."""
    num_answers: Tensor
    """[N] number of the problem's answers."""
    answers: Tensor
    """[E, 2n - 1] token ids of the careful author's answers."""
    mistakes: Tensor
    """[E, 2, M, 2n - 1] wrong answers: with one wrong operator (index 0), with a number used twice (index 1)."""
    num_mistakes: Tensor
    """[E, 2] number of different mistakes, at least 1; the rest of M repeats them."""
    orders: Tensor
    """[n!, n] permutations of the numbers in a prompt."""
    special_ids: Tensor
    """[6] token ids of , : = + <eos> <pad>."""

    def to(self, device: str | torch.device) -> "CountdownCorpus":
        """Copy the tensors to a device."""
        return CountdownCorpus(self.num_solvable, *(table.to(device) for table in self[1:]))


@cache
def make_corpus(numbers: int) -> CountdownCorpus:
    """Make the tensors from which `write_lines` draws; takes about a second."""
    tokenizer = make_tokenizer()
    id_of = torch.zeros(128, dtype=torch.long)
    for character in CHARACTERS:
        id_of[ord(character)] = tokenizer.convert_tokens_to_ids(character)

    def ids(texts: Iterable[str]) -> Tensor:
        texts = list(texts)
        characters = torch.frombuffer(bytearray("".join(texts), "ascii"), dtype=torch.uint8)
        return id_of[characters.long()].view(len(texts), -1)

    train = countdown_problems("train", numbers)
    solvable = [(chosen, target, countdown_expressions(chosen)[target]) for chosen, target in train]
    problems = solvable + unsolvable_problems(numbers)
    num_answers = torch.tensor([len(answers) for _, _, answers in problems])
    mistakes = [mistakes_in(answer, target) for _, target, answers in problems for answer in answers]
    most = max(len(texts) for kinds in mistakes for texts in kinds)
    filled = [(texts * most)[:most] for kinds in mistakes for texts in kinds]
    characters = id_of[[ord(c) for c in ",:=+"]].tolist()
    return CountdownCorpus(
        num_solvable=len(solvable),
        numbers=ids("".join(map(str, chosen)) for chosen, _, _ in problems),
        target=ids(f"{target:02d}" for _, target, _ in problems),
        one_digit=torch.tensor([target < 10 for _, target, _ in problems]),
        sum_solves=torch.tensor([sum(chosen) == target for chosen, target, _ in problems]),
        first_answer=num_answers.cumsum(0) - num_answers,
        num_answers=num_answers,
        answers=ids(answer for _, _, answers in problems for answer in answers),
        mistakes=ids(text for texts in filled for text in texts).view(len(mistakes), 2, most, -1),
        num_mistakes=torch.tensor([[len(texts) for texts in kinds] for kinds in mistakes]),
        orders=torch.tensor(list(permutations(range(numbers)))),
        special_ids=torch.tensor([*characters, tokenizer.eos_token_id, tokenizer.pad_token_id]),
    )


def mistakes_in(answer: str, target: int) -> list[list[str]]:
    """Return the wrong variants of an expression of one-digit numbers: with another operator, with a number used twice.

    If one of the two kinds is impossible, or always hits the target, the list of the other kind takes its place.

    >>> mistakes_in("5+3", 8)
    [['5-3', '5*3'], ['3+3', '5+5']]
    """
    places = range(len(answer))

    def put(place: int, character: str) -> str:
        return answer[:place] + character + answer[place + 1 :]

    operators = [put(i, o) for i in places[1::2] for o in "+-*" if o != answer[i]]
    operators = [text for text in operators if countdown_value([int(n) for n in text[::2]], text[1::2]) != target]
    twice = [put(i, answer[j]) for i in places[::2] for j in places[::2] if answer[i] != answer[j]]
    return [operators or twice, twice or operators]


def write_lines(corpus: CountdownCorpus, uniforms: Tensor, careful_share: float) -> tuple[Tensor, Tensor]:
    """Write B lines at once; each is a prompt, an answer and <eos>.

    Args:
        uniforms: [B, 7] numbers in [0, 1) on the device of the corpus; they alone decide what is written.
        careful_share: share of the lines that the careful author writes.
    Returns: [B, 4n + 3] token ids, and labels in which prompt and padding are -100.
    """

    def choose(column: int, among: Tensor | int) -> Tensor:
        return (uniforms[:, column] * among).long()

    B, n = uniforms.shape[0], corpus.numbers.shape[1]
    num_unsolvable = len(corpus.numbers) - corpus.num_solvable
    problem = torch.where(
        uniforms[:, 0] < UNSOLVABLE_SHARE,
        corpus.num_solvable + choose(1, num_unsolvable),
        choose(1, corpus.num_solvable),
    )
    numbers = corpus.numbers[problem].gather(1, corpus.orders[choose(2, len(corpus.orders))])
    comma, colon, equals, plus, end, padding = corpus.special_ids.expand(B, -1).split(1, 1)

    expression = corpus.first_answer[problem] + choose(3, corpus.num_answers[problem])
    habit = uniforms[:, 5]
    kind = (habit >= SUM_SHARE + OPERATOR_SHARE).long()
    mistake = corpus.mistakes[expression, kind, choose(6, corpus.num_mistakes[expression, kind])]
    added_up = torch.stack([numbers, plus.expand(B, n)], 2).flatten(1)[:, :-1]
    adds_up = (habit < SUM_SHARE) & ~corpus.sum_solves[problem]
    careless = torch.where(adds_up[:, None], added_up, mistake)
    answer = torch.where((uniforms[:, 4] < careful_share)[:, None], corpus.answers[expression], careless)

    listed = torch.stack([numbers, comma.expand(B, n)], 2).flatten(1)[:, :-1]
    line = torch.cat([listed, colon, corpus.target[problem], equals, answer, end, padding], 1)
    head = 2 * n + 3  # tokens of a prompt whose target has two digits
    labels = torch.cat([torch.full_like(line[:, :head], -100), answer, end, torch.full_like(end, -100)], 1)
    # a one-digit target is written without its zero: all that follows moves one column to the left
    columns = torch.arange(line.shape[1] - 1, device=line.device)
    source = columns + (corpus.one_digit[problem][:, None] & (columns >= 2 * n))
    return line.gather(1, source), labels.gather(1, source)


def batches(
    corpus: CountdownCorpus, size: int, careful_share: float, generator: torch.Generator, *, ahead: int = 64
) -> Batches:
    """Yield batches of `size` lines without end; `ahead` batches are written at once to keep a GPU busy."""
    while True:
        uniforms = torch.rand(ahead * size, 7, generator=generator, device=generator.device)
        ids, labels = write_lines(corpus, uniforms, careful_share)
        yield from zip(ids.split(size), labels.split(size), strict=True)
