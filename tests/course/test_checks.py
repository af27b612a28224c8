"""The judges against learners: right ones in several styles, wrong ones by name, unfinished and broken ones.

A learner's solution is a text; a mutant is that text with one piece replaced by another, which deserves a sentence
that starts as given. Where that is "", any refusal will do.
"""

import inspect
import math
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from grpo_lab import checks
from grpo_lab.algorithm.advantages import group_advantages
from grpo_lab.algorithm.losses import grpo_loss
from grpo_lab.course.checks import Judge, Verdict
from grpo_lab.rewards import verifiable as rewards

JUDGES = {name: judge for name, judge in vars(checks).items() if isinstance(judge, Judge)}

SOLUTIONS = {
    "token_logprobs": """
def token_logprobs(logits, tokens, temperature=1.0, kept=None):
    logits = logits / temperature
    if kept is not None:
        out = torch.ones_like(logits, dtype=torch.bool)
        for v in range(logits.shape[-1]):
            out[..., v] = ~(kept == v).any(-1)
        logits = logits.masked_fill(out, -torch.inf)
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
""",
    "baseline": """
def baseline(rewards):
    K = rewards.shape[1]
    total = rewards.sum(dim=1, keepdim=True)
    return (total - rewards) / (K - 1)
""",
    "reinforce_loss": """
def reinforce_loss(logprobs, rewards):
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return -((rewards - others) * logprobs).mean()
""",
    "completion_mask": """
def completion_mask(tokens, end_ids):
    is_end = torch.zeros_like(tokens, dtype=torch.bool)
    for end in end_ids:
        is_end = is_end | (tokens == end)
    before = is_end.cumsum(1) - is_end.int()
    return before == 0
""",
    "group_advantages": """
def group_advantages(rewards):
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)
""",
    "clipped_surrogate": """
def clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_range=0.2):
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = torch.exp(log_ratio)
    A = advantages.unsqueeze(1)
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    gain = torch.min(ratio * A, clipped * A)
    return torch.where(mask, gain, 0.0)
""",
    "kl_estimate": """
def kl_estimate(logprobs, ref_logprobs, mask):
    log_ratio = torch.where(mask, ref_logprobs - logprobs, 0.0)
    k3 = torch.exp(log_ratio) - log_ratio - 1
    return torch.where(mask, k3, 0.0)
""",
    "aggregate": """
def aggregate(values, mask):
    values = torch.where(mask, values, 0.0)
    lengths = mask.sum(dim=1).clamp(min=1)
    return (values.sum(dim=1) / lengths).mean()
""",
    "grpo_loss": """
def grpo_loss(logprobs, old_logprobs, advantages, mask, ref_logprobs=None, kl_coef=0.0, clip_range=0.2):
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    A = advantages[:, None]
    gain = torch.min(ratio * A, ratio.clamp(1 - clip_range, 1 + clip_range) * A)
    if kl_coef > 0:
        d = torch.where(mask, ref_logprobs - logprobs, 0.0)
        gain = gain - kl_coef * (d.exp() - d - 1)
    gain = torch.where(mask, gain, 0.0)
    return -(gain.sum(1) / mask.sum(1).clamp(min=1)).mean()
""",
    "truncate": """
def truncate(logits, temperature=1.0, top_k=0, top_p=1.0):
    order = logits.argsort(-1, descending=True)
    sorted_logits = logits.gather(-1, order) / temperature
    if top_k > 0:
        sorted_logits[..., top_k:] = -torch.inf
    probs = sorted_logits.softmax(-1)
    before = probs.cumsum(-1) - probs
    cut = (before >= top_p) if top_p < 1 else (before < 0)
    cut = cut | sorted_logits.isinf()
    cut[..., 0] = False
    cut = torch.zeros_like(cut).scatter(-1, order, cut)
    return logits.masked_fill(cut, -torch.inf)
""",
    "reward": """
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
""",
    "training_step": """
def training_step(model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0):
    logprobs = model(tokens).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    A = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    A = A.flatten()
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.min(ratio * A[:, None], ratio.clamp(0.8, 1.2) * A[:, None])
    if kl_coef:
        d = ref_logprobs - logprobs
        gain = gain - kl_coef * (d.exp() - d - 1)
    loss = -((gain * mask).sum(1) / mask.sum(1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
""",
}

MUTANTS = {
    "token_logprobs": {
        "logits.log_softmax(-1)": {
            "logits.softmax(-1)": "you return probabilities",
            "-logits.log_softmax(-1)": "your sign is flipped",
            "logits": "you return the raw logits",
            "logits.log_softmax(1)": "you normalise over the positions",
            "logits.log_softmax(0)": "",
            "logits.softmax(-1).log()": "your probability is rounded to 0",
            "(logits.exp() / logits.exp().sum(-1, keepdim=True)).log()": "your exp overflows",
            "(logits.softmax(-1) + 1e-9).log()": "",
            "logits.log_softmax(-1) / math.log(2)": "you measure in bits",
            "logits - logits.exp().sum(-1, keepdim=True).log()": "your exp overflows to infinity.",
        },
        "logits / temperature": {
            "logits * temperature": "you multiply by the temperature",
            "logits": "you ignore the temperature",
        },
        "logits = logits / temperature": {
            "logits = logits.detach() / temperature": "the value is right, but no gradient",
        },
        "if kept is not None": {
            "if False": "you count tokens that the sampler had cut away",
        },
        "return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)": {
            "return logprobs[:, :, tokens]": "you look every token up at every position",
            "return logprobs.amax(-1)": "you score the lik",
        },
        "(-1, tokens.unsqueeze(-1))": {
            "(-1, tokens.unsqueeze(-1).roll(1, 1))": "",
        },
        ".squeeze(-1)\n": {
            ".squeeze(-1).sum(1)\n": "you add up the tokens",
            "\n": "your answer has the shape [1, 1, 1], expected [1, 1]",
        },
        "logprobs.gather(-1, tokens.": {
            "logprobs[:, :-1].gather(-1, tokens[:, 1:].": "you shift by one",
        },
        "return logprobs.": {
            "return torch.cat([logprobs[:, :1], logprobs[:, :-1]], 1).": "",
            "return logprobs.roll(1, 1).": "you score each token with the logits of the position bef",
        },
    },
    "baseline": {
        "(total - rewards) / (K - 1)": {
            "rewards - (total - rewards) / (K - 1)": "you return the advantages",
            "rewards.mean(1, keepdim=True).expand_as(rewards)": "your mean holds the very reward",
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
            "rewards.sum(dim=1)": "your sum has lost its column",
            "rewards.sum(dim=0, keepdim=True)": "",
            "rewards.sum()": "",
        },
    },
    "reinforce_loss": {
        "return -": {
            "return ": "your sign is flipped",
        },
        "(rewards - others)": {
            "rewards": "you leave the baseline out",
            "others": "you weigh by the baseline",
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
            "(rewards * logprobs - others)": "you take the baseline from the product",
        },
    },
    "completion_mask": {
        "is_end.cumsum(1) - is_end.int()": {
            "is_end.cumsum(1)": "you drop the end token",
        },
        "return before == 0": {
            "return ~is_end": "you hide the end tokens",
            "return (before == 0).all(0).expand_as(tokens)": "you cut all rows where",
            "return torch.arange(tokens.shape[1]) <= is_end.int().argmax(1)[:, None]": "you look for an",
            "return is_end.flip(1).cumsum(1).flip(1) > 0": "",
            "return tokens != 0": "you drop the padding id only",
            "return (before == 0).float()": "your answer has the type torch.float32, expected torch.bool",
            "return (before == 0).long()": "your answer has the type torch.int64, expected torch.bool",
        },
        "before == 0": {
            "before > 0": "your mask is upside down",
            "before >= 0": "you let everything count",
            "before <= 1": "",
            "(before == 0) | is_end": "you let padding count",
        },
        "for end in end_ids": {
            "for end in end_ids[:1]": "you look for one of the end ids only",
        },
        "cumsum(1)": {
            "cumsum(0)": "",
        },
    },
    "group_advantages": {
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
            "rewards.mean(1)": "your mean or std has lost its column",
        },
        "mean = rewards.mean(dim=1, keepdim=True)\n    std = rewards.std(dim=1, keepdim=True)": {
            "mean = rewards.mean(0)\n    std = rewards.std(0)": "you average over the prompts",
            "mean = rewards.mean(1)\n    std = rewards.std(1)": "your mean or std has lost its column",
        },
        "(rewards - mean) / (std + 1e-4)": {
            "rewards - mean / (std + 1e-4)": "a bracket is missing: the mean",
            "(rewards - mean) / std + 1e-4": "a bracket is missing: std_eps",
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
    },
    "clipped_surrogate": {
        "torch.min(ratio * A, clipped * A)": {
            "torch.min(ratio, clipped) * A": "your clip is inverted where the advantage is negative.",
            "ratio * A": "you do not clip",
            "clipped * A": "you clip even where the policy must come back",
        },
        "torch.min(": {
            "torch.max(": "you take the larger of the two",
        },
        "1 - clip_range, 1 + clip_range": {
            "max=1 + clip_range": "your clip has no lower end",
            "min=1 - clip_range": "your clip has no upper end",
            "-clip_range, clip_range": "you clip around 0",
            "0.8, 1.2": "you ignore clip_range",
            "1 / (1 + clip_range), 1 + clip_range": "",
        },
        "logprobs - old_logprobs": {
            "old_logprobs - logprobs": "your ratio is upside down",
        },
        "torch.exp(log_ratio)": {
            "torch.where(mask, logprobs / old_logprobs, 1.0)": "you divide logarithms: subtract, then exp",
            "(log_ratio.sum(1, True) / mask.sum(1, True)).exp()": "you take one ratio for the whole row: that is GSPO",
            "log_ratio": "your ratio lacks its exp",
            "torch.exp(log_ratio).detach()": "the value is right, but no gradient",
            "torch.exp(log_ratio.detach()) * (1 + 2 * (logprobs - logprobs.detach()))": "",
        },
        "torch.clamp(ratio, 1 - clip_range, 1 + clip_range)": {
            "log_ratio.clamp(-clip_range, clip_range).exp()": "you clip the logarithm",
        },
        "gain = ": {
            "gain = -": "your sign is flipped",
        },
        "advantages.unsqueeze(1)": {
            "advantages": "your advantages run along the tokens",
            "torch.ones(len(advantages), 1)": "you leave the advantages out",
            "advantages.abs().unsqueeze(1)": "",
        },
        "return torch.where(mask, gain, 0.0)": {
            "return gain": "",
            "return gain[mask]": "your answer has the shape [1], expected [1, 1]",
            "return gain.sum() / mask.sum()": "your answer has the shape []",
        },
        "torch.where(mask, logprobs - old_logprobs, 0.0)": {
            "logprobs - old_logprobs": "you mask after exp",
            "(logprobs - old_logprobs) * mask": "",
        },
        "    A = ": {
            "    advantages *= 1.5\n    A = ": "you change an input in place",
        },
    },
    "kl_estimate": {
        "ref_logprobs - logprobs": {
            "logprobs - ref_logprobs": "your KL is upside down",
        },
        "torch.exp(log_ratio) - log_ratio - 1": {
            "-log_ratio": "your KL is k1",
            "log_ratio**2 / 2": "your KL is k2",
            "log_ratio**2": "",
            "log_ratio.abs()": "",
            "torch.exp(log_ratio) + log_ratio - 1": "the linear term of your KL has",
            "torch.exp(log_ratio) - 1": "the linear term of your KL is missing",
            "torch.exp(log_ratio) - log_ratio": "your KL lacks its -1",
            "1 + log_ratio - torch.exp(log_ratio)": "your KL has its sign flipped",
        },
        "k3 = ": {
            "k3 = 0.9 * ": "",
        },
        "k3 = torch.exp(log_ratio)": {
            "k3 = logprobs.exp() * (logprobs - ref_logprobs) + 0 * torch.exp(log_ratio)": "",
        },
        "return torch.where(mask, k3, 0.0)": {
            "return k3.sum(1)": "you add up the tokens",
            "return k3.detach()": "the value is right, but no gradient",
        },
        "torch.where(mask, ref_logprobs - logprobs, 0.0)": {
            "ref_logprobs - logprobs": "you mask after exp",
            "logprobs.sub_(ref_logprobs).neg()": "you change an input",
        },
        "torch.where(mask, ref_logprobs - logprobs, 0.0)\n": {
            "ref_logprobs - logprobs\n    mask = mask | True\n": "you ign",
        },
    },
    "aggregate": {
        "(values.sum(dim=1) / lengths).mean()": {
            "values.sum() / mask.sum().clamp(min=1)": "each token counts the same",
            "values.sum()": "you add up everything",
            "values.mean()": "you divide by the width",
            "values.sum(dim=1).mean()": "you add up the tokens of a row",
            "(values.sum(dim=1) / lengths).sum()": "you add up the rows",
            "values.sum(dim=1) / lengths": "you return one number for each row",
            "(values.sum(dim=1) / lengths).amax()": "",
            "(values.sum(1) / lengths).sum() / mask.any(1).sum().clamp(1)": "you leave out empty rows",
            "(values.sum(dim=1) / lengths).mean().item()": "the value is right, but no g",
        },
        "values = torch.where(mask, values, 0.0)\n    lengths = mask.sum(dim=1).clamp(min=1)\n": {
            "lengths = values.shape[1]\n": "you ignore the mask",
        },
        "dim=1": {
            "dim=0": "you average position by position",
        },
        ".clamp(min=1)": {
            "": "you divide 0 by 0",
            ".clamp(min=2)": "",
        },
        "torch.where(mask, values, 0.0)": {
            "values * mask": "you multiply by the mask",
            "values.nan_to_num()": "",
        },
        "return (values": {
            "return -(values": "you flip the sign",
        },
    },
    "grpo_loss": {
        "return -(": {
            "return (": "your sign is flipped: the optimizer",
        },
        "gain - kl_coef": {
            "gain + kl_coef": "the sign of your KL term is flipped",
        },
        "(d.exp() - d - 1)": {
            "(d.exp() - d - 1).detach()": "your KL carries no gradient",
            "-d": "your KL is k1",
            "d**2 / 2": "your KL is k2",
        },
        "if kl_coef > 0": {
            "if False": "your loss has no KL term",
        },
        "kl_coef * (": {
            "(": "you ignore kl_coef",
        },
        "ref_logprobs - logprobs": {
            "old_logprobs - logprobs": "your KL is that to the old policy",
            "logprobs - ref_logprobs": "your KL is upside down: swap",
            "logprobs.detach() - ref_logprobs": "your KL is upside down and without gradient",
        },
        "if kl_coef > 0:\n        d": {
            "if True:\n        d": "without kl_coef there is no reference: do not touch ref_logprobs then",
        },
        "torch.min(": {
            "torch.max(": "you take the larger",
        },
        "gain = torch.min(ratio * A, ratio.clamp(1 - clip_range, 1 + clip_range) * A)": {
            "gain = torch.min(ratio, ratio.clamp(1 - clip_range, 1 + clip_range)) * A": "your clip is inverted",
            "gain = ratio * A": "you do not clip",
        },
        "logprobs - old_logprobs": {
            "old_logprobs - logprobs": "your ratio is upside down",
            "logprobs - logprobs.detach()": "your ratio is always 1: it must compare with old_logprobs",
        },
        "ratio = log_ratio.exp()": {
            "ratio = log_ratio.exp().detach()": "the value is right, but no gradient",
        },
        "advantages[:, None]": {
            "advantages": "perhaps your advantages run along the tokens",
        },
        "(gain.sum(1) / mask.sum(1).clamp(min=1)).mean()": {
            "gain.sum() / mask.sum()": "each token counts the same",
            "gain.mean()": "you divide by the width",
        },
        ".clamp(min=1)": {
            "": "you divide 0 by 0",
        },
        "torch.where(mask, logprobs - old_logprobs, 0.0)": {
            "logprobs - old_logprobs": "you mask after exp",
        },
        "log_ratio = ": {
            "mask = mask | True\n    log_ratio = ": "you ignore the mask",
        },
        "1 - clip_range, 1 + clip_range": {
            "0.8, 1.2": "you ignore clip_range",
        },
        ", ref_logprobs=None, kl_coef=0.0": {
            "": "your function takes no kl_coef and no ref_logprobs",
        },
    },
    "truncate": {
        "descending=True": {
            "descending=False": "",
        },
        "cut = torch.zeros_like(cut).scatter(-1, order, cut)": {
            "pass": "you forget to put the tokens back",
        },
        "before = probs.cumsum(-1) - probs": {
            "before = probs.cumsum(-1)": "",
        },
        "(before >= top_p)": {
            "(probs.cumsum(-1) > top_p)": "",
            "(probs < top_p)": "you compare top_p with each probability alone",
            "(before > top_p + 0.15)": "",
        },
        "(before >= top_p) if top_p < 1 else (before < 0)": {
            "before < 0": "you ignore top_p",
        },
        "if top_k > 0": {
            "if False": "you ignore top_k",
            "if True": "",
        },
        " / temperature": {
            "": "you ignore the temperature",
            " * temperature": "",
        },
        "    cut[..., 0] = False\n": {
            "    cut = cut | (before + probs > top_p)\n": "",
        },
        "probs = sorted_logits.softmax(-1)": {
            "probs = (logits.gather(-1, order) / temperature).softmax(-1)": "you measure top_p on all tokens",
        },
        "return logits.masked_fill(cut, -torch.inf)": {
            "return logits.softmax(-1).masked_fill(cut, 0.0)": "your answer must be",
            "return logits.masked_fill(cut, 0.0)": "your answer must be ids",
            "return logits.masked_fill_(cut, -torch.inf)": "you change an input",
            "return (~cut).long()": "your answer must be ids",
            "return order[..., :1]": "",
        },
    },
    "reward": {
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
    },
    "training_step": {
        "    optimizer.step()\n": {
            "": "the weights do not move",
            "    optimizer.step()\n    optimizer.step()\n": "you make two steps",
            '    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)\n    optimizer.step()\n': "",
        },
        "    optimizer.zero_grad()\n": {
            "": "the gradients of an earlier step are still there",
            "    model.zero_grad()\n": "your function raises AttributeError: model is only a function here; empty the",
        },
        "    loss.backward()\n    optimizer.step()\n": {
            "    loss.backward()\n    optimizer.zero_grad()\n    optimizer.step()\n": "the weights do not move",
        },
        "loss = -": {
            "loss = ": "your sign is flipped: the optimizer walks down",
        },
        "A = A.flatten()": {
            "A = A.T.flatten()": "your advantages are in another order",
            "pass": "perhaps advantages are [P, K], the loss wants [B]: flatten",
            "A = rewards.flatten()": "you use the rewards as they are",
        },
        " / (rewards.std(1, keepdim=True) + 1e-4)": {
            "": "you do not divide the advantages by the std",
        },
        "rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True)": {
            "rewards.mean()) / (rewards.std()": "you compare wi",
        },
        "(logprobs - old_logprobs)": {
            "(logprobs - logprobs)": "the weights do not move",
            "(logprobs - logprobs.detach())": "your ratio is always 1",
            "(old_logprobs - logprobs)": "your ratio is upside down",
        },
        ".log_softmax(-1)": {
            ".softmax(-1)": "you score with probabilities, not with their logarithms",
        },
        "if kl_coef": {
            "if False": "your step drops the KL: hand ref_logprobs and kl_coef on to grpo_loss",
        },
        "torch.min(": {
            "torch.max(": "you take the larger",
        },
        "gain = torch.min(ratio * A[:, None], ratio.clamp(0.8, 1.2) * A[:, None])": {
            "gain = ratio * A[:, None]": "you do not",
            "gain = ratio.clamp(0.8, 1.2) * A[:, None]": "you clip even where",
        },
        "(gain * mask).sum(1) / mask.sum(1)": {
            "gain.sum(1) / mask.shape[1]": "you ignore the mask",
        },
        "((gain * mask).sum(1) / mask.sum(1)).mean()": {
            "(gain * mask).sum() / mask.sum()": "each token counts the same",
        },
        "loss.backward()": {
            "loss.detach().backward()": "your function raises RuntimeError: element 0 of tensors does not",
        },
    },
}


def learner(source: str):
    """The function that a text defines."""
    names = {"torch": torch, "math": math, "re": __import__("re")}
    exec(source, names)
    return next(value for name, value in names.items() if inspect.isfunction(value))


# --- Right answers in other styles


def logprobs_by_loop(logits, tokens):
    rows = []
    for row, ids in zip(logits, tokens, strict=True):
        rows.append([z[i] - z.max() - (z - z.max()).exp().sum().log() for z, i in zip(row, ids, strict=True)])
    return rows


def logprobs_by_einsum(logits, tokens, *, temperature):
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[-1]).double()
    return torch.einsum("btv,btv->bt", (logits.double() / temperature).log_softmax(-1), one_hot)


def logprobs_by_cross_entropy(logits, tokens, temperature=1):
    return -torch.nn.functional.cross_entropy((logits / temperature).transpose(1, 2), tokens, reduction="none")


def baseline_by_loop(rewards):
    return [[sum(row[:k] + row[k + 1 :]) / (len(row) - 1) for k in range(len(row))] for row in rewards.tolist()]


def baseline_from_the_mean(rewards):
    K = rewards.shape[1]
    return (K * rewards.mean(1, keepdim=True) - rewards) / (K - 1)


def baseline_by_matrix(rewards):
    K = rewards.shape[1]
    return rewards.double() @ (1 - torch.eye(K, dtype=torch.float64)) / (K - 1)


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


def mask_by_loop(tokens, end_ids):
    rows = []
    for row in tokens.tolist():
        going, kept = True, []
        for token in row:
            kept.append(going)
            going = going and token not in end_ids
        rows.append(kept)
    return rows


def mask_by_argmax(tokens, end_ids):
    is_end = (tokens[..., None] == torch.tensor(end_ids)).any(-1)
    first = torch.where(is_end.any(1), is_end.int().argmax(1), tokens.shape[1])
    return torch.arange(tokens.shape[1])[None] <= first[:, None]


def mask_by_cumprod(tokens, end_ids):
    going = (~torch.isin(tokens, torch.tensor(end_ids))).long().cumprod(1)
    return torch.cat([torch.ones_like(going[:, :1]), going[:, :-1]], 1).bool()


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


def surrogate_by_loop(logprobs, old_logprobs, advantages, mask, clip_range=0.2):
    rows = []
    for i in range(len(mask)):
        row = []
        for t in range(mask.shape[1]):
            A, ratio = float(advantages[i]), (logprobs[i, t] - old_logprobs[i, t]).exp()
            if not mask[i, t]:
                row.append(0.0)
            elif A > 0 and ratio > 1 + clip_range:
                row.append((1 + clip_range) * A)
            elif A < 0 and ratio < 1 - clip_range:
                row.append((1 - clip_range) * A)
            else:
                row.append(ratio * A)
        rows.append([torch.as_tensor(v, dtype=torch.float32) for v in row])
    return rows


def surrogate_by_sign(logprobs, old_logprobs, advantages, mask, *, clip_range):
    ratio = (logprobs.double() - old_logprobs).masked_fill(~mask, 0.0).exp()
    A = advantages.double().view(-1, 1).expand_as(ratio)
    bounded = torch.where(A > 0, ratio.clamp(max=1 + clip_range), ratio.clamp(min=1 - clip_range))
    return (A * bounded).masked_fill(~mask, 0.0)


def surrogate_without_a_setting(logprobs, old_logprobs, advantages, mask):
    out = torch.zeros_like(logprobs)
    c = (logprobs[mask] - old_logprobs[mask]).exp()
    A = advantages[:, None].expand_as(mask)[mask]
    out[mask] = torch.stack([c * A, c.clamp(0.8, 1.2) * A]).amin(0)
    return out


def kl_by_loop(logprobs, ref_logprobs, mask):
    def k3(p, q):
        return (q - p).exp() - (q - p) - 1

    return [
        [k3(logprobs[i, t], ref_logprobs[i, t]) if mask[i, t] else torch.tensor(0.0) for t in range(mask.shape[1])]
        for i in range(mask.shape[0])
    ]


def kl_by_expm1(logprobs, ref_logprobs, mask):
    d = (ref_logprobs.double() - logprobs.double()).masked_fill(~mask, 0.0)
    return torch.expm1(d) - d


def kl_by_index(logprobs, ref_logprobs, mask, estimator):
    assert estimator == "k3"
    out = torch.zeros(mask.shape)
    p, q = logprobs[mask], ref_logprobs[mask]
    out[mask] = (q - p).exp() + p - q - 1
    return out


def aggregate_by_loop(values, mask):
    total = 0.0
    for row, keep in zip(values, mask, strict=True):
        counted = [v for v, k in zip(row, keep, strict=True) if k]
        total = total + (sum(counted) / len(counted) if counted else 0.0)
    return total / len(values)


def aggregate_by_einsum(values, mask, how):
    assert how == "sequence-mean"
    weights = mask.double() / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return torch.einsum("bt,bt->", values.double().masked_fill(~mask, 0.0), weights)


def aggregate_by_rows(values, mask):
    return torch.stack([row[keep].mean() if keep.any() else row[:0].sum() for row, keep in zip(values, mask)]).mean()  # noqa: B905


def loss_by_loop(logprobs, old_logprobs, advantages, mask, ref_logprobs, kl_coef):
    ref_logprobs = logprobs if ref_logprobs is None else ref_logprobs
    total = 0.0
    for i in range(len(mask)):
        losses = []
        for t in mask[i].nonzero().flatten().tolist():
            p, q, A = logprobs[i, t], ref_logprobs[i, t], advantages[i]
            ratio = (p - old_logprobs[i, t]).exp()
            losses.append(kl_coef * ((q - p).exp() - (q - p) - 1) - torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A))
        total = total + sum(losses) / max(len(losses), 1)
    return total / len(mask)


def loss_in_double(logprobs, old_logprobs, advantages, mask, *, ref_logprobs, kl_coef, clip_range):
    q = logprobs if kl_coef == 0 else ref_logprobs
    p, old, q = (x.double().masked_fill(~mask, 0.0) for x in (logprobs, old_logprobs, q))
    A, c = advantages[:, None].double(), (p - old).exp()
    loss = kl_coef * ((q - p).exp() - (q - p) - 1) - torch.minimum(c * A, c.clamp(1 - clip_range, 1 + clip_range) * A)
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bt,bt->", loss, weights.double()) / len(mask)


def ids_by_loop(logits, temperature=1.0, top_k=0, top_p=1.0):
    rows = []
    for row in logits.tolist():
        ranked = sorted(range(len(row)), key=lambda v: -row[v])[: top_k or None]
        total = sum(math.exp(row[v] / temperature) for v in ranked)
        kept, mass = [], 0.0
        for v in ranked:
            if mass < top_p or top_p >= 1:
                kept.append(v)
            mass += math.exp(row[v] / temperature) / total
        rows.append(kept)
    return [kept + [-1] * (max(map(len, rows)) - len(kept)) for kept in rows]


def only_top_k(logits, top_k):
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)


def only_top_p(logits, *, top_p):
    values, order = logits.sort(descending=True)
    remove = values.softmax(-1).cumsum(-1) >= top_p
    remove[..., 1:], remove[..., 0] = remove[..., :-1].clone(), False
    return ~remove.scatter(-1, order, remove) if top_p < 1 else None


def scaled_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    logits = logits.double() / temperature
    ranks = logits.argsort(-1, descending=True).argsort(-1)
    logits = logits.masked_fill(ranks >= (top_k or logits.shape[-1]), -torch.inf)
    p = logits.softmax(-1)
    before = torch.einsum("bv,bvw->bw", p, (p[:, :, None] > p[:, None, :]).double())
    return logits.masked_fill(before >= top_p, -torch.inf) if top_p < 1 else logits


def reward_in_ints(prompts, completions, **columns):
    return [int(rewards.solves(p, c)) for p, c in zip(prompts, completions, strict=True)]


def reward_in_bools(prompts, completions):
    return [rewards.solves(p, c) for p, c in zip(prompts, completions, strict=True)]


def reward_as_tensor(prompts, completions):
    return torch.tensor(rewards.countdown(prompts, completions), dtype=torch.float64)


def step_by_package(model, optimizer, tokens, mask, rewards, old_logprobs):
    optimizer.zero_grad(set_to_none=False)
    logprobs = checks.token_logprobs.reference(model(tokens), tokens)
    loss = grpo_loss(logprobs, old_logprobs, group_advantages(rewards).view(-1), mask).loss
    loss.backward()
    optimizer.step()


def step_by_hand(model, optimizer, tokens, mask, rewards, old_logprobs):
    p = model(tokens).log_softmax(-1).double()
    loss = 0.0
    for i, A in enumerate(group_advantages(rewards.double()).flatten()):
        for t in range(int(mask[i].sum())):
            c = (p[i, t, tokens[i, t]] - old_logprobs[i, t]).exp()
            loss = loss - torch.min(c * A, c.clamp(0.8, 1.2) * A) / mask[i].sum() / len(tokens)
    (weights,) = optimizer.param_groups[0]["params"]
    (gradient,) = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        weights -= optimizer.param_groups[0]["lr"] * gradient


def step_with_hygiene(
    model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0, clip_range=0.2
):
    loss = grpo_loss(
        checks.token_logprobs.reference(model(tokens), tokens),
        old_logprobs,
        group_advantages(rewards).flatten(),
        mask,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        clip_range=clip_range,
    ).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item()}


RIGHT = {
    "token_logprobs": [logprobs_by_loop, logprobs_by_einsum, logprobs_by_cross_entropy],
    "baseline": [baseline_by_loop, baseline_from_the_mean, baseline_by_matrix],
    "reinforce_loss": [reinforce_by_loop, reinforce_from_the_group_mean],
    "completion_mask": [mask_by_loop, mask_by_argmax, mask_by_cumprod],
    "group_advantages": [advantages_by_loop, advantages_by_einsum, advantages_by_numpy],
    "clipped_surrogate": [surrogate_by_loop, surrogate_by_sign, surrogate_without_a_setting],
    "kl_estimate": [kl_by_loop, kl_by_expm1, kl_by_index],
    "aggregate": [aggregate_by_loop, aggregate_by_einsum, aggregate_by_rows],
    "grpo_loss": [loss_by_loop, loss_in_double, grpo_loss],
    "truncate": [ids_by_loop, only_top_k, only_top_p, scaled_logits],
    "reward": [reward_in_ints, reward_in_bools, reward_as_tensor],
    "training_step": [step_by_package, step_by_hand, step_with_hygiene],
}


@pytest.fixture(autouse=True, scope="module")
def the_first_optimizer_is_slow():
    torch.optim.SGD([torch.zeros(1)], lr=1.0).step()  # imports PyTorch's compiler, once


def seconds_of(judge, fn) -> tuple[Verdict, float]:
    began = time.process_time()  # a busy machine is not our fault
    return judge(fn), time.process_time() - began


# --- Right and wrong


def test_there_is_a_judge_for_each_function_that_a_learner_writes():
    assert JUDGES.keys() == SOLUTIONS.keys() == MUTANTS.keys() == RIGHT.keys()
    assert all(repr(judge).startswith(name + "(") for name, judge in JUDGES.items())
    assert all(sum(map(len, replacements.values())) >= 8 for replacements in MUTANTS.values())


@pytest.mark.parametrize("name", JUDGES)
def test_the_right_answers_pass(name):
    for fn in [learner(SOLUTIONS[name]), JUDGES[name].reference, *RIGHT[name]]:
        verdict, seconds = seconds_of(JUDGES[name], fn)
        assert verdict, (fn, verdict)
        assert repr(verdict).startswith(f"[ok] {name}: all ")
        assert seconds < 1


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        pytest.param(name, old, new, sentence, id=f"{name}: {sentence or new}")
        for name, replacements in MUTANTS.items()
        for old, versions in replacements.items()
        for new, sentence in versions.items()
    ],
)
def test_the_wrong_answers_fail_and_hear_why(name, old, new, sentence):
    assert old in SOLUTIONS[name]
    verdict, seconds = seconds_of(JUDGES[name], learner(SOLUTIONS[name].replace(old, new)))
    assert not verdict
    assert verdict.state == "not yet"
    assert verdict.message.startswith(sentence), verdict
    assert verdict.message.endswith(".") or "raises" in verdict.message
    assert verdict.hint
    assert seconds < 1


# those two inherit what may not apply
@pytest.mark.parametrize("name", sorted(JUDGES.keys() - {"grpo_loss", "training_step"}))
def test_each_diagnosis_is_told_apart_from_the_others(name):
    judge = JUDGES[name]
    for sentence, version in judge.diagnoses.items():

        def whatever_it_is_given(*inputs, version=version, **settings):
            taken = inspect.signature(version).parameters
            takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
            return version(*inputs, **{k: v for k, v in settings.items() if takes_all or k in taken})

        verdict = judge(whatever_it_is_given)
        assert verdict.message == f"{sentence}.", verdict


def test_two_mistakes_at_once_are_named_with_care():
    source = SOLUTIONS["clipped_surrogate"].replace("torch.where(mask, gain, 0.0)", "gain")
    verdict = checks.clipped_surrogate(learner(source.replace("torch.min(", "torch.max(")))
    assert verdict.message == "perhaps you take the larger of the two, not the smaller."


def test_advantages_that_are_not_flattened_are_named_with_the_packages_loss_too():
    def step(model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0):
        logprobs = checks.token_logprobs.reference(model(tokens), tokens)
        penalty = {"ref_logprobs": ref_logprobs, "kl_coef": kl_coef}
        loss = grpo_loss(logprobs, old_logprobs, group_advantages(rewards), mask, **penalty).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert checks.training_step(step).message == "perhaps advantages are [P, K], the loss wants [B]: flatten."


def test_two_updates_are_told_from_one_update_that_steps_twice():
    step = learner(SOLUTIONS["training_step"])
    verdict = checks.training_step(lambda *inputs, **settings: [step(*inputs, **settings) for _ in range(2)])
    assert verdict.message == "you update twice."


def test_a_version_that_is_wrong_where_the_learner_is_right_is_not_blamed():
    # 0 is also what "right and wrong are swapped" answers first, but not what it answers next
    verdict = checks.reward(lambda prompts, completions: [0.0] * len(completions))
    assert verdict.message == "nothing ever earns a reward."


def test_the_smallest_failing_input_is_shown():
    source = SOLUTIONS["kl_estimate"].replace("torch.exp(log_ratio) - log_ratio - 1", "torch.exp(log_ratio) - 1")
    verdict = checks.kl_estimate(learner(source))
    assert verdict.inputs == {"logprobs": "[[-0.6931]]", "ref_logprobs": "[[-0.6931]]", "mask": "[[True]]"}
    assert verdict.compared == {"expected gradient": "[[0]]", "got gradient": "[[-1]]"}


def test_numbers_that_look_alike_are_shown_with_more_digits():
    verdict = checks.aggregate(lambda values, mask: values.mean() * 1.0002)
    assert verdict.compared == {"expected": "3", "got": "3.001"}
    verdict = checks.aggregate(lambda values, mask: values.mean() * 1.00012)
    assert verdict.compared == {"expected": "3", "got": "3.00036"}


# --- Settings


def test_settings_are_tried_only_if_the_function_takes_them():
    verdict = checks.clipped_surrogate(surrogate_without_a_setting)
    assert verdict.message == "all 8 cases are right (without clip_range)."
    assert checks.truncate(only_top_k).message == "all 4 cases are right (without temperature, top_p)."


@pytest.mark.parametrize(
    ("judge", "fn", "message"),
    [
        (checks.truncate, lambda logits: logits, "your function takes no temperature and no top_k and no top_p."),
        (checks.grpo_loss, lambda *inputs, ref_logprobs: 0.0, "your function takes no clip_range and no kl_coef."),
        (checks.kl_estimate, lambda logprobs: logprobs, "your function raises TypeError: "),
        (checks.kl_estimate, lambda p, q, m, beta: p, "your function raises TypeError: "),
        (
            checks.kl_estimate,
            torch.ones(2),
            "hand over the function itself, without calling it; this is of type Tensor.",
        ),
        (checks.kl_estimate, None, "hand over the function itself, without calling it; this is of type NoneType."),
        (checks.kl_estimate, len, "your function raises TypeError: "),
    ],
)
def test_a_function_that_cannot_be_asked(judge, fn, message):
    verdict = judge(fn)
    assert not verdict
    assert verdict.message.startswith(message)


# --- Stubs, and what breaks


def raises(error):
    def fn(*inputs, **settings):
        raise error

    return fn


@pytest.mark.parametrize("name", JUDGES)
def test_a_stub_is_not_written_yet(name):
    def unfinished(*inputs, **settings):
        """Your turn."""

    for stub in (
        unfinished,
        lambda *i, **s: ...,
        raises(NotImplementedError),
        raises(NotImplementedError("your turn")),
    ):
        verdict = JUDGES[name](stub)
        assert not verdict
        assert (verdict.state, verdict.message) == ("to do", "not written yet.")
        assert verdict.hint == repr(JUDGES[name])


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
    assert verdict.message == "evaluate_expression returns None, and no pair, for what is no expression."
    assert verdict.compared["got"] == "raises TypeError: cannot unpack non-iterable NoneType object"
    assert checks.reward(indexes).message == "evaluate_expression returns None for what is no expression."


def test_a_function_that_is_half_written():
    verdict = checks.aggregate(lambda values, mask: values.mean() if len(values) < 2 else None)
    assert verdict.state == "not yet"
    assert verdict.message.startswith("nothing comes back here. What must hold: of two full rows")
    assert verdict.compared == {"expected": "3.75"}


@pytest.mark.parametrize("name", JUDGES)
def test_an_exception_becomes_a_verdict(name):
    verdict = JUDGES[name](raises(KeyError("loss")))
    assert (verdict.state, verdict.message) == ("not yet", "your function raises KeyError: 'loss'")
    assert verdict.inputs
    assert JUDGES[name](raises(AssertionError())).message == "your function raises AssertionError."
    unsupported = NotImplementedError("\"log_softmax\" not implemented for 'Long'")  # PyTorch's, not a stub's
    assert JUDGES[name](raises(unsupported)).message.startswith("your function raises NotImplementedError: ")


@pytest.mark.parametrize("name", sorted(JUDGES.keys() - {"training_step"}))  # what that one returns is free
@pytest.mark.parametrize(
    "answer",
    ["text", {"a": 1}, object(), [[1.0], [2.0, 3.0]], [None], [], torch.zeros(7, 7), torch.zeros(0), 1j, float("nan"),
     torch.tensor([[True]]), iter([1.0]), np.zeros((3, 3)), torch.zeros(1, 1, dtype=torch.complex64),
     torch.zeros(2, 2).to_sparse()],
    ids=lambda answer: type(answer).__name__,
)  # fmt: skip
def test_whatever_comes_back_is_answered(name, answer):
    verdict = JUDGES[name](lambda *inputs, **settings: answer)
    assert verdict.state == "not yet"
    assert repr(verdict)
    assert verdict._repr_html_()


def test_types_that_lose_digits_are_named():
    def in_half(logits, tokens):
        return logprobs_by_cross_entropy(logits, tokens).bfloat16()

    message = checks.token_logprobs(in_half).message
    assert message == "your answer has the type torch.bfloat16, expected torch.float32."
    verdict = checks.reward(lambda p, c: torch.tensor(reward_in_ints(p, c)))
    assert verdict.message == "your answer has the type torch.int64, expected torch.float32."


def test_what_is_not_finite_is_named():
    def unsafe(values, mask):
        return values[mask].mean() if len(mask) > 1 else values.mean() * math.inf

    assert checks.aggregate(unsafe).message.startswith("your answer is not finite. What must hold: of one full row")


def test_the_learners_surroundings_do_not_matter_and_are_left_alone(capsys):
    state = torch.get_rng_state()
    with torch.no_grad():
        assert checks.clipped_surrogate(learner(SOLUTIONS["clipped_surrogate"]))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")  # the verdict is returned: printing it too would show it twice


def test_judging_twice_gives_the_same_verdict():
    source = SOLUTIONS["truncate"].replace("masked_fill(cut", "masked_fill_(cut")
    first = checks.truncate(learner(source))
    assert repr(first) == repr(checks.truncate(learner(source)))
    assert checks.truncate(learner(SOLUTIONS["truncate"]))


# --- How it looks


def inverted(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).where(mask, 0.0).exp() * advantages[:, None]
    clipped = (logprobs - old_logprobs).where(mask, 0.0).exp().clamp(0.8, 1.2) * advantages[:, None]
    return torch.where(advantages[:, None] < 0, ratio.maximum(clipped), ratio.minimum(clipped)).where(mask, 0.0)


def test_the_text():
    assert str(checks.clipped_surrogate(inverted)).splitlines() == [
        "[not yet] clipped_surrogate: your clip is inverted where the advantage is negative.",
        "    logprobs      [[-0.6931]]",
        "    old_logprobs  [[-1.386]]",
        "    advantages    [-1]",
        "    mask          [[True]]",
        "    expected      [[-2]]    got  [[-1.2]]",
        "    hint          " + checks.clipped_surrogate.hint,
    ]
    verdict = checks.clipped_surrogate(learner(SOLUTIONS["clipped_surrogate"]))
    assert str(verdict) == "[ok] clipped_surrogate: all 9 cases are right."


def test_long_values_stand_below_each_other():
    verdict = Verdict("f", "not yet", "wrong.", compared={"expected": "1" * 60, "got": "2" * 60})
    assert str(verdict).splitlines()[1:] == [f"    expected  {'1' * 60}", f"    got       {'2' * 60}"]


class Tags(HTMLParser):
    """Fails on tags that do not match; keeps the text and the attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_html_of_a_notebook():
    page = Tags(checks.clipped_surrogate(inverted)._repr_html_())
    assert page.attributes[0] == ("div", {"role": "status", "style": "border-left:4px solid #d55e00;padding:4px 10px"})
    assert page.texts[:2] == [
        "[not yet] clipped_surrogate",
        ": your clip is inverted where the advantage is negative.",
    ]
    assert page.texts[-5:] == ["expected", "got", "[[-2]]", "[[-1.2]]", checks.clipped_surrogate.hint]
    assert [a.get("scope") for tag, a in page.attributes if tag == "th"] == ["row"] * 4 + ["col"] * 2


def test_the_state_is_said_in_words_and_colours_that_everyone_tells_apart():
    states = {"ok": surrogate_by_loop, "not yet": inverted, "to do": lambda *inputs: None}
    for state, fn in states.items():
        verdict = checks.clipped_surrogate(fn)
        assert Tags(verdict._repr_html_()).texts[0] == f"[{state}] clipped_surrogate"
        assert checks.COLOURS[state] in verdict._repr_html_()
        assert "\x1b" not in verdict._repr_html_() + repr(verdict)
    assert len(set(checks.COLOURS.values())) == 3


def test_what_a_learner_raises_cannot_become_html():
    verdict = checks.reward(raises(ValueError("<script>alert(1)</script>")))
    assert "<script>" in repr(verdict)
    assert "<script>" not in verdict._repr_html_()
