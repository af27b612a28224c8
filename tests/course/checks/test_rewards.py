"""The judge of the Countdown reward: right answers in several styles, wrong ones by name."""

import torch
from judges import JudgeTests

from grpo_lab import checks
from grpo_lab.rewards import verifiable as rewards


def reward_in_ints(prompts, completions, **columns):
    return [int(rewards.solves(p, c)) for p, c in zip(prompts, completions, strict=True)]


def reward_in_bools(prompts, completions):
    return [rewards.solves(p, c) for p, c in zip(prompts, completions, strict=True)]


def reward_as_tensor(prompts, completions):
    return torch.tensor(rewards.countdown(prompts, completions), dtype=torch.float64)


class TestReward(JudgeTests):
    judge = checks.reward
    right = [reward_in_ints, reward_in_bools, reward_as_tensor]
    solution = """
def reward(prompts, completions):
    results = []
    for prompt, completion in zip(prompts, completions):
        numbers, target = prompt.rstrip("=").split(":")
        given = sorted(int(n) for n in numbers.split(","))
        used = sorted(int(n) for n in re.findall(r"[0-9]+", completion))
        try:
            legal = re.fullmatch(r"[-0-9+*/()]+", completion) and "**" not in completion and "//" not in completion
            value = eval(completion) if legal else None
        except (SyntaxError, ZeroDivisionError):
            value = None
        right = value is not None and abs(value - int(target)) < 1e-6 and used == given
        results.append(1.0 if right else 0.0)
    return results
"""
    mutants = {
        " and used == given": {
            "": "you do not look at the numbers",
        },
        " and abs(value - int(target)) < 1e-6": {
            "": "you do not look at the value",
        },
        "1.0 if right else 0.0": {
            "0.0 if right else 1.0": "right and wrong are swapped",
            "0.0": "nothing ever earns",
            "1.0": "",
        },
        "used == given": {
            "set(used) == set(given)": "you compare sets",
            "set(used) <= set(given)": "you let numbers be left out",
            "set(used) >= set(given)": "you let numbers be used that",
            "len(used) == len(given)": "",
        },
        "[0-9]+": {
            "[0-9]": "What must hold: 35 is one number",
        },
        'given = sorted(int(n) for n in numbers.split(","))': {
            'given = [int(n) for n in numbers.split(",")]': "you compare with the prompt's numbers unsorted",
        },
        "value is not None": {
            "value": "you take the value 0 for no value",
        },
        "abs(value - int(target))": {
            "abs(abs(value) - int(target))": "you forget the sign",
        },
        "abs(value - int(target)) < 1e-6": {
            "int(value) == int(target)": "you cut off fractions",
            "abs(value - int(target)) < 2": "",
        },
        "legal = re": {
            'legal = "**" not in completion or re': "What must hold: a completion is a text",
        },
        '"**" not in completion': {
            "True": "What must hold: only + - * / count",
        },
        ' and "//" not in completion': {
            "": "What must hold: only + - * / count, and // is none",
        },
        "(SyntaxError, ZeroDivisionError)": {
            "SyntaxError": "your function raises ZeroDivisionError: division by zero",
            "ZeroDivisionError": "your function raises SyntaxError",
        },
        "zip(prompts, completions)": {
            "((prompts[0], c) for c in completions)": "you judge all completions by the first",
        },
        "return results": {
            "return sum(results)": "your answer has the shape []",
            "return sorted(results)": "",
        },
        "results = []": {
            "results = []\n    completions.append('')": "you change an input in place",
        },
        'numbers.split(",")': {
            '"3,5,7".split(",")': "",
        },
    }


def test_a_version_that_is_wrong_where_the_learner_is_right_is_not_blamed():
    # 0 is also what "right and wrong are swapped" answers first, but not what it answers next
    verdict = checks.reward(lambda prompts, completions: [0.0] * len(completions))
    assert verdict.message == "nothing ever earns a reward."


def test_an_error_with_a_known_cause_is_explained_and_shown():
    def unpacks(prompts, completions):
        pairs = []
        for completion in completions:
            value, used = rewards.evaluate_expression(completion)
            pairs.append((value, used))
        return rewards.countdown(prompts, completions)

    def indexes(prompts, completions):
        assert all(rewards.evaluate_expression(completion)[1] for completion in completions)
        return rewards.countdown(prompts, completions)

    verdict = checks.reward(unpacks)
    assert verdict.message == "evaluate_expression returns None, not a pair, if the text is not an expression."
    assert verdict.compared["got"] == "raises TypeError: cannot unpack non-iterable NoneType object"
    assert checks.reward(indexes).message == "evaluate_expression returns None if the text is not an expression."
