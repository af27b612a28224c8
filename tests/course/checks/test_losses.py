"""The judges of the clipped surrogate, the mean over tokens and the GRPO loss: right answers and wrong ones."""

import torch
from judges import JudgeTests, learner

from grpo_lab import checks
from grpo_lab.algorithm.losses import grpo_loss


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


class TestClippedSurrogate(JudgeTests):
    judge = checks.clipped_surrogate
    right = [surrogate_by_loop, surrogate_by_sign, surrogate_without_a_setting]
    solution = """
def clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_range=0.2):
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = torch.exp(log_ratio)
    A = advantages.unsqueeze(1)
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    gain = torch.min(ratio * A, clipped * A)
    return torch.where(mask, gain, 0.0)
"""
    mutants = {
        "torch.min(ratio * A, clipped * A)": {
            "torch.min(ratio, clipped) * A": "your clip is inverted where the advantage is negative.",
            "ratio * A": "you do not clip",
            "clipped * A": "you clip even where the policy has moved the wrong way",
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
            "old_logprobs - logprobs": "your ratio is inverted",
        },
        "torch.exp(log_ratio)": {
            "torch.where(mask, logprobs / old_logprobs, 1.0)": "you divide logarithms: subtract, then exp",
            "(log_ratio.sum(1, True) / mask.sum(1, True)).exp()": "you take one ratio for the whole row: that is GSPO",
            "log_ratio": "your ratio lacks the exp",
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
    }


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


class TestAggregate(JudgeTests):
    judge = checks.aggregate
    right = [aggregate_by_loop, aggregate_by_einsum, aggregate_by_rows]
    solution = """
def aggregate(values, mask):
    values = torch.where(mask, values, 0.0)
    lengths = mask.sum(dim=1).clamp(min=1)
    return (values.sum(dim=1) / lengths).mean()
"""
    mutants = {
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
    }


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


class TestGrpoLoss(JudgeTests):
    judge = checks.grpo_loss
    right = [loss_by_loop, loss_in_double, grpo_loss]
    solution = """
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
"""
    mutants = {
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
            "old_logprobs - logprobs": "your KL compares with the old policy, not with the reference",
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
            "old_logprobs - logprobs": "your ratio is inverted",
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
    }


def test_two_mistakes_at_once_are_named_with_care():
    source = TestClippedSurrogate.solution.replace("torch.where(mask, gain, 0.0)", "gain")
    verdict = checks.clipped_surrogate(learner(source.replace("torch.min(", "torch.max(")))
    assert verdict.message == "perhaps you take the larger of the two, not the smaller."
