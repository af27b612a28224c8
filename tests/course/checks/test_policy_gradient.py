"""The judges of the baseline and the REINFORCE loss: right answers in several styles, wrong ones by name."""

import torch
from judges import JudgeTests

from grpo_lab import checks


def baseline_by_loop(rewards):
    return [[sum(row[:k] + row[k + 1 :]) / (len(row) - 1) for k in range(len(row))] for row in rewards.tolist()]


def baseline_from_the_mean(rewards):
    K = rewards.shape[1]
    return (K * rewards.mean(1, keepdim=True) - rewards) / (K - 1)


def baseline_by_matrix(rewards):
    K = rewards.shape[1]
    return rewards.double() @ (1 - torch.eye(K, dtype=torch.float64)) / (K - 1)


class TestBaseline(JudgeTests):
    judge = checks.baseline
    right = [baseline_by_loop, baseline_from_the_mean, baseline_by_matrix]
    solution = """
def baseline(rewards):
    K = rewards.shape[1]
    total = rewards.sum(dim=1, keepdim=True)
    return (total - rewards) / (K - 1)
"""
    mutants = {
        "(total - rewards) / (K - 1)": {
            "rewards - (total - rewards) / (K - 1)": "you return the advantages",
            "rewards.mean(1, keepdim=True).expand_as(rewards)": "your mean includes the completion's own",
            "rewards.mean().expand_as(rewards)": "your mean is that of all rewards",
            "rewards.mean(0).expand_as(rewards)": "you average over the prompts",
            "rewards.mean(0)": "your answer has the shape [2], expected [2, 2]",
            "rewards.mean(1)": "your answer has the shape [2], expected [2, 2]",
            "total - rewards": "you add up the others",
            "(total - rewards) / K": "you divide by K",
            "total / (K - 1) - rewards": "",
            "rewards": "you return the rewards",
        },
        "rewards.sum(dim=1, keepdim=True)": {
            "rewards.sum(dim=1)": "your sum has lost a dimension",
            "rewards.sum(dim=0, keepdim=True)": "",
            "rewards.sum()": "",
        },
    }


def reinforce_by_loop(logprobs, rewards):
    P, K = rewards.shape
    total = 0.0
    for p in range(P):
        for k in range(K):
            total = total - (rewards[p, k] - baseline_by_loop(rewards)[p][k]) * logprobs[p, k]
    return total / (P * K)


def reinforce_from_the_group_mean(logprobs, rewards):
    K = rewards.shape[1]
    return -((rewards - rewards.mean(1, keepdim=True)) * logprobs).sum() / (len(rewards) * (K - 1))


class TestReinforceLoss(JudgeTests):
    judge = checks.reinforce_loss
    right = [reinforce_by_loop, reinforce_from_the_group_mean]
    solution = """
def reinforce_loss(logprobs, rewards):
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return -((rewards - others) * logprobs).mean()
"""
    mutants = {
        "return -": {
            "return ": "your sign is flipped",
        },
        "(rewards - others)": {
            "rewards": "you leave the baseline out",
            "others": "you multiply by the baseline",
            "(rewards - rewards.mean(1, keepdim=True))": "your baseline is the group's mean",
            "(rewards - rewards.mean())": "your baseline is the mean of all",
        },
        "* logprobs)": {
            "* logprobs.exp())": "you use probabilities",
            "* logprobs.detach())": "the value is right, but no gradient",
        },
        ".mean()": {
            ".sum()": "you add up",
        },
        "((rewards - others) * logprobs)": {
            "(rewards * logprobs - others)": "you subtract the baseline from the product",
        },
    }
