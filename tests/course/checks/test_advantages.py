"""The judge of group advantages: right answers in several styles, wrong ones by name."""

import math

import numpy as np
import torch
from judges import JudgeTests

from grpo_lab import checks


def advantages_by_loop(rewards):
    rows = []
    for row in rewards.tolist():
        mean = sum(row) / len(row)
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / (len(row) - 1))
        rows.append([(r - mean) / (std + 1e-4) for r in row])
    return rows


def advantages_by_einsum(rewards, std_eps):
    r = rewards.double()
    centre = torch.eye(r.shape[1], dtype=torch.float64) - 1 / r.shape[1]
    d = torch.einsum("pk,kj->pj", r, centre)
    return d / ((torch.einsum("pk,pk->p", d, d) / (r.shape[1] - 1)).sqrt()[:, None] + std_eps)


def advantages_by_numpy(rewards):
    r = rewards.numpy().astype(np.float64)
    return (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)


class TestGroupAdvantages(JudgeTests):
    judge = checks.group_advantages
    right = [advantages_by_loop, advantages_by_einsum, advantages_by_numpy]
    solution = """
def group_advantages(rewards):
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)
"""
    mutants = {
        " / (std + 1e-4)": {
            "": "you subtract the mean, but divide by nothing",
        },
        "(rewards - mean) /": {
            "rewards /": "you divide by the spread, but do not subtract",
            "(mean - rewards) /": "your sign is flipped",
        },
        "rewards.std(dim=1, keepdim=True)": {
            "rewards.std(dim=1, keepdim=True, correction=0)": "your std divides by K",
            "rewards.var(dim=1, keepdim=True)": "you divide by the variance",
            "rewards.std()": "your std is that of all rewards",
        },
        "rewards.mean(dim=1, keepdim=True)": {
            "rewards.mean()": "your mean is that of all rewards",
            "rewards.median(dim=1, keepdim=True).values": "",
            "rewards.mean(1)": "your mean or std has lost a dimension",
        },
        "mean = rewards.mean(dim=1, keepdim=True)\n    std = rewards.std(dim=1, keepdim=True)": {
            "mean = rewards.mean(0)\n    std = rewards.std(0)": "you average over the prompts",
            "mean = rewards.mean(1)\n    std = rewards.std(1)": "your mean or std has lost a dimension",
        },
        "(rewards - mean) / (std + 1e-4)": {
            "rewards - mean / (std + 1e-4)": "a bracket is missing: subtract",
            "(rewards - mean) / std + 1e-4": "a bracket is missing: add std_eps",
        },
        "rewards.mean(dim=1, keepdim=True)\n    std = rewards.std(dim=1, keepdim=True)": {
            "rewards.mean()\n    std = rewards.std()": "your mean and std are those of all rewards",
        },
        "return (rewards - mean)": {
            "return (rewards - mean) * rewards.shape[1] / (rewards.shape[1] - 1)": "you compare with the others only",
            "rewards -= mean\n    return rewards": "you change an input in place",
        },
        "(std + 1e-4)": {
            "std": "you divide 0 by 0",
            "(std**2 + 1e-4).sqrt()": "your std_eps is inside the root",
            "(std + 1e-8)": "your std_eps is so small",
            "(std + 1e-6)": "",
            "(std + 1e-3)": "",
        },
        "return (rewards - mean) / (std + 1e-4)": {
            "return ((rewards - mean) / (std + 1e-4)).half().float()": "",
        },
    }
