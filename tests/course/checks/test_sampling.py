"""The judges of the completion mask and truncation: right answers in several styles, wrong ones by name."""

import math

import torch
from judges import JudgeTests

from grpo_lab import checks


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


class TestCompletionMask(JudgeTests):
    judge = checks.completion_mask
    right = [mask_by_loop, mask_by_argmax, mask_by_cumprod]
    solution = """
def completion_mask(tokens, end_ids):
    is_end = torch.zeros_like(tokens, dtype=torch.bool)
    for end in end_ids:
        is_end = is_end | (tokens == end)
    before = is_end.cumsum(1) - is_end.int()
    return before == 0
"""
    mutants = {
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
            "before > 0": "your mask is inverted",
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
    }


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


class TestTruncate(JudgeTests):
    judge = checks.truncate
    right = [ids_by_loop, only_top_k, only_top_p, scaled_logits]
    solution = """
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
"""
    mutants = {
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
    }
